// What a loader's list holds before and after a run that saves a file, in a page that stays open.
//
//   node list_files.mjs <host url> <canvas|nodes2> <locale>
//
// Reads lines {"workflow": path, "stand_ins": {...}, "loader": node type, "widget": its name} and answers with
// {"before": [...], "after": [...], "value": the loader's choice, "result": how the run ended}.

import fs from 'node:fs';
import { answerLines, load, standIn } from './editor.mjs';

const RUN_MS = 300_000;
const LISTED_MS = 20_000;

const [url, renderer, locale] = process.argv.slice(2);

await answerLines(url, renderer, locale, async (page, question) => {
  await load(page, JSON.parse(fs.readFileSync(question.workflow, 'utf8')));
  await standIn(page, question.stand_ins);
  return page.evaluate(async ({ loader, widget, runMs, listedMs }) => {
    const added = window.LiteGraph.createNode(loader);
    window.app.graph.add(added);
    const list = added.widgets.find((each) => each.name === widget);
    const before = [...list.options.values];
    const ended = new Promise((resolve) => {
      setTimeout(() => resolve('timeout'), runMs);
      for (const name of ['execution_success', 'execution_error', 'execution_interrupted']) {
        window.app.api.addEventListener(name, () => resolve(name), { once: true });
      }
    });
    await window.app.queuePrompt(0, 1);
    const result = await ended;
    const until = Date.now() + listedMs;
    while (list.options.values.length === before.length && Date.now() < until) {
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    return { before, after: [...list.options.values], value: list.value, result };
  }, { ...question, runMs: RUN_MS, listedMs: LISTED_MS });
});
