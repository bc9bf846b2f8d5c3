// What becomes of a node with a growing number of inputs in a subgraph: packed, saved and loaded, unpacked.
//
//   node subgraphs.mjs <host url> <canvas|nodes2> <locale>
//
// Reads lines {"workflow": path, "type": node type} and answers with the names of the node's inputs in the prompt:
// {"before": [...], "packed": [...], "loaded": [...], "unpacked": [...]}.

import fs from 'node:fs';
import { answerLines, load } from './editor.mjs';

const SETTLED_MS = 800; // the editor goes on after each of these steps

const [url, renderer, locale] = process.argv.slice(2);

await answerLines(url, renderer, locale, async (page, question) => {
  await load(page, JSON.parse(fs.readFileSync(question.workflow, 'utf8')));
  return page.evaluate(async ({ type, settled }) => {
    const { app } = window;
    const rest = () => new Promise((resolve) => setTimeout(resolve, settled));
    const given = async () => {
      const { output } = await app.graphToPrompt();
      const node = Object.values(output).find((each) => each.class_type === type);
      return Object.keys(node?.inputs ?? {}).sort();
    };
    const all = () => app.graph.nodes ?? app.graph._nodes;
    const found = { before: await given() };
    app.graph.convertToSubgraph(new Set([all().find((node) => node.type === type)]));
    await rest();
    found.packed = await given();
    await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())));
    await rest();
    found.loaded = await given();
    app.graph.unpackSubgraph(all().find((node) => node.subgraph));
    await rest();
    found.unpacked = await given();
    return found;
  }, { type: question.type, settled: SETTLED_MS });
});
