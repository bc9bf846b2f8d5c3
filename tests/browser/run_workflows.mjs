// Open workflows in the graph editor, check them, run those that are to run, and tell what happened.
//
//   node run_workflows.mjs <host url> <canvas|nodes2> <locale>
//
// Reads lines {"workflow": path, "screenshot": path, "run": true, "stand_ins": {...}} and answers each with a report.
// stand_ins are put in the place of values before the run (graphs/pocket.py has them). Without a screenshot it is only
// opened, and neither saved nor run. test_workflows.py judges.

import fs from 'node:fs';
import { answerLines, fitView, load, standIn } from './editor.mjs';

const RUN_MS = 300_000;
const DRAWN_MS = 1_200; // the last previews and pictures are drawn after the run has ended
const SMALL = { width: 480, height: 320 }; // while a graph runs
const LOADED_MS = 300; // the editor looks for missing files after a load
const WIDER_FONT =
  'font-family: Verdana, "DejaVu Sans", sans-serif !important; letter-spacing: 0.08em !important; ' +
  'line-height: 1.6 !important;';
const FRONT_END_ONLY = ['Note', 'MarkdownNote', 'Reroute', 'PrimitiveNode'];

/** Node types the editor does not know, the words on the nodes, and the graph as the host would get it. */
function describe(page) {
  return page.evaluate(async (frontEndOnly) => {
    const nodes = window.app.graph.nodes ?? window.app.graph._nodes;
    const unknown = (node) => !node.constructor.nodeData && !node.subgraph && !frontEndOnly.includes(node.type);
    const { output } = await window.app.graphToPrompt();
    return {
      missing: nodes.filter(unknown).map((node) => node.type),
      titles: nodes.map((node) => node.title),
      inputs: nodes.map((node) => (node.inputs ?? []).map((input) => input.label ?? input.localized_name ?? input.name)),
      prompt: output,
    };
  }, FRONT_END_ONLY);
}

/** Where every node is drawn: [title, left, top, right, bottom], in the graph's units. */
function boxes(page, renderer) {
  return page.evaluate((drawnAsHtml) => {
    const nodes = window.app.graph.nodes ?? window.app.graph._nodes;
    if (!drawnAsHtml) {
      return nodes.map((node) => {
        const [left, top, width, height] = node.getBounding();
        return [node.title, left, top, left + width, top + height];
      });
    }
    return nodes.flatMap((node) => {
      const element = document.querySelector(`[data-node-id="${node.id}"]`);
      if (!element) return [];
      const box = element.getBoundingClientRect();
      const scale = box.width / element.offsetWidth; // of the view
      return [[node.title, ...[box.left, box.top, box.right, box.bottom].map((edge) => edge / scale)]];
    });
  }, renderer === 'nodes2');
}

/** What the editor found missing when it opened the graph: names of models, with where it offers them from, and media. */
function missing(page) {
  return page.evaluate(() => {
    const app = document.querySelector('#vue-app')?.__vue_app__;
    const stores = app?.config.globalProperties.$pinia?._s; // the editor's own stores, by name
    const models = stores?.get('missingModel')?.missingModelCandidates ?? [];
    const media = stores?.get('missingMedia')?.missingMediaCandidates ?? [];
    return {
      stores: Boolean(stores?.has('missingModel') && stores.has('missingMedia')),
      models: models.map(({ name, url, directory }) => [name, url ?? null, directory ?? null]),
      media: media.map(({ name }) => name),
    };
  });
}

/** Draw all words wider and taller, as another set of fonts would; `undo` takes it back. */
async function widerFont(page) {
  const style = await page.addStyleTag({ content: `[data-node-id] *, .dom-widget * { ${WIDER_FONT} }` });
  await page.waitForTimeout(400);
  return () => style.evaluate((element) => element.remove());
}

/** Queue the graph and wait for its end: [event, detail]. */
function run(page) {
  return page.evaluate(async (limit) => {
    const { api } = window.app;
    const ended = new Promise((resolve) => {
      setTimeout(() => resolve(['timeout', null]), limit);
      for (const name of ['execution_success', 'execution_error', 'execution_interrupted']) {
        api.addEventListener(name, (event) => resolve([name, event.detail]), { once: true });
      }
    });
    const accepted = await window.app.queuePrompt(0, 1);
    const errors = window.app.lastNodeErrors ?? {}; // older editors answer false with no errors when all is well
    return accepted || Object.keys(errors).length === 0 ? ended : ['rejected', errors];
  }, RUN_MS);
}

/** Save the graph as the editor does, load that again, and give the graph the host would get then. */
function roundTrip(page) {
  return page.evaluate(async () => {
    const { workflow } = await window.app.graphToPrompt();
    await window.app.loadGraphData(JSON.parse(JSON.stringify(workflow)), true, true, 'again');
    return (await window.app.graphToPrompt()).output;
  });
}

const [url, renderer, locale] = process.argv.slice(2);

await answerLines(url, renderer, locale, async (page, question) => {
  await load(page, JSON.parse(fs.readFileSync(question.workflow, 'utf8')));
  await page.waitForTimeout(LOADED_MS);
  const lacking = await missing(page);
  const described = await describe(page);
  if (!question.screenshot) return { ...described, lacking };
  const again = await roundTrip(page);
  let outcome = { result: 'not run', detail: null };
  if (question.stand_ins) {
    await standIn(page, question.stand_ins);
    outcome.ran = (await describe(page)).prompt;
  }
  if (question.run && described.missing.length === 0) {
    const whole = page.viewportSize();
    await page.setViewportSize(SMALL); // without a GPU every frame of a large view takes the host's time
    const [result, detail] = await run(page);
    await page.setViewportSize(whole);
    outcome = { ...outcome, result, detail };
    await page.waitForTimeout(DRAWN_MS);
  }
  await fitView(page);
  await page.screenshot({ path: question.screenshot });
  const inOurFont = await boxes(page, renderer);
  const undo = await widerFont(page);
  const wider = await boxes(page, renderer);
  await undo();
  return { ...outcome, ...described, lacking, again, boxes: inOurFont, wider };
});
