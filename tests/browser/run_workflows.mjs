// Open workflows in the graph editor, check them, run those that are to run, and tell what happened.
//
//   node run_workflows.mjs <host url> <canvas|nodes2> <locale>
//
// Reads lines {"workflow": path, "screenshot": path, "run": true, "values": {"steps": 4}} and answers each with a report.
// values are set in every node with a widget of that name before the run, to make it short. test_workflows.py judges.

import fs from 'node:fs';
import { answerLines, fitView, load } from './editor.mjs';

const RUN_MS = 300_000;
const DRAWN_MS = 1_200; // the last previews and pictures are drawn after the run has ended
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

/** Where every node is drawn: [title, left, top, right, bottom], in the page's pixels (nodes2) or the graph's (canvas). */
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
      const { left, top, right, bottom } = element.getBoundingClientRect();
      return [[node.title, left, top, right, bottom]];
    });
  }, renderer === 'nodes2');
}

/** Set every widget of these names. */
function setValues(page, values) {
  return page.evaluate((wanted) => {
    for (const node of window.app.graph.nodes ?? window.app.graph._nodes) {
      for (const widget of node.widgets ?? []) {
        if (widget.name in wanted) widget.value = wanted[widget.name];
      }
    }
  }, values);
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
  const described = await describe(page);
  const again = await roundTrip(page);
  let outcome = { result: 'not run', detail: null };
  if (question.run && described.missing.length === 0) {
    await setValues(page, question.values);
    const [result, detail] = await run(page);
    outcome = { result, detail };
    await page.waitForTimeout(DRAWN_MS);
  }
  await fitView(page);
  await page.screenshot({ path: question.screenshot });
  return { ...outcome, ...described, again, boxes: await boxes(page, renderer) };
});
