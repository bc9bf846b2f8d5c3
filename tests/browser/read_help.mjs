// Open nodes' help in the graph editor's panel and measure what is shown there.
//
//   node read_help.mjs <host url> <locale>
//
// Reads lines {"node": id, "screenshot"?: path} and answers each with {"title", "words": number of letters, "pictures":
// [[address, natural width, shown width]], "tables": [[shown width, width it needs]], "width": of the panel}.

import { answerLines } from './editor.mjs';

const SHOWN_MS = 30_000;

/** Put one node on the canvas, select it and open the panel at its help. */
function open(page, type) {
  return page.evaluate((wanted) => {
    const { app, LiteGraph } = window;
    app.graph.clear();
    const node = LiteGraph.createNode(wanted);
    app.graph.add(node);
    app.canvas.deselectAll();
    app.canvas.select(node);
    const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
    stores.get('canvas').updateSelectedItems();
    stores.get('rightSidePanel').openPanel('info');
  }, type);
}

const [url, locale] = process.argv.slice(2);

await answerLines(url, 'canvas', locale, async (page, { node, screenshot }) => {
  await page.setViewportSize({ width: 1440, height: 900 }); // an ordinary window
  await open(page, node);
  const ours = (id) => {
    const pictures = [...document.querySelectorAll('.node-help-content .markdown-content img')];
    return pictures.length > 0 && pictures.every((each) => each.complete && each.src.includes(id));
  };
  await page.waitForFunction(ours, node, { timeout: SHOWN_MS });
  if (screenshot) await page.screenshot({ path: screenshot });
  return page.evaluate(() => {
    const content = document.querySelector('.node-help-content .markdown-content');
    return {
      title: content.querySelector('h1').innerText,
      words: content.innerText.length,
      width: content.clientWidth,
      pictures: [...content.querySelectorAll('img')].map((each) => [each.src, each.naturalWidth, each.clientWidth]),
      tables: [...content.querySelectorAll('table')].map((each) => [each.clientWidth, each.scrollWidth]),
    };
  });
});
