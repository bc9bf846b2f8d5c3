// Build graphs in the graph editor from descriptions by names, and give each as the editor saves it:
// {"workflow": UI format, "prompt": API format}. tests/make_workflows.py writes the descriptions and keeps the results.
//
//   node author_workflows.mjs <host url>
//
// Reads a description from each line: {"nodes": {key: {"type", "at": [x, y], "size"?: [w, h], "title"?, "colour"?, "widgets"?: {name: value},
// "note"?: the text of a note, "inputs"?: {name: "key.output"}}}, "groups": [{"title", "bounding": [x, y, w, h], "colour"}]}

import { answerLines, forget, load } from './editor.mjs';

const FIRST_VIEW = { scale: 0.65, offset: [580, 180] }; // the left upper part, large enough to read

/** Make the nodes and links; an unknown type, widget or socket is an error. */
function build(page, description) {
  return page.evaluate(({ nodes, groups }) => {
    const { app, LiteGraph } = window;
    app.graph.clear();
    const made = {};
    const find = (list, name, what) => {
      const index = (list ?? []).findIndex((item) => item.name === name);
      if (index < 0) throw new Error(`no ${what} ${name}`);
      return index;
    };
    for (const [key, wanted] of Object.entries(nodes)) {
      const node = LiteGraph.createNode(wanted.type);
      if (!node) throw new Error(`no node type ${wanted.type}`);
      app.graph.add(node);
      made[key] = node;
      node.pos = wanted.at;
      if (wanted.title) node.title = wanted.title;
      if (wanted.colour) Object.assign(node, wanted.colour);
      for (const [name, value] of Object.entries(wanted.widgets ?? {})) {
        node.widgets[find(node.widgets, name, `widget of ${wanted.type}`)].value = value;
      }
      if (wanted.note) node.widgets[0].value = wanted.note;
      node.setSize(wanted.size ?? node.computeSize());
    }
    for (const [key, wanted] of Object.entries(nodes)) {
      for (const [name, source] of Object.entries(wanted.inputs ?? {})) {
        const [from, output] = source.split('.');
        if (!made[from]) throw new Error(`${key}.${name}: no node ${from}`);
        const slot = find(made[from].outputs, output, `output of ${from}`);
        made[from].connect(slot, made[key], find(made[key].inputs, name, `input of ${key}`));
      }
    }
    for (const wanted of groups) {
      const group = new LiteGraph.LGraphGroup(wanted.title);
      group.pos = wanted.bounding.slice(0, 2);
      group.size = wanted.bounding.slice(2);
      group.color = wanted.colour;
      app.graph.add(group);
    }
  }, description);
}

/** The graph in both formats; loaded once more first, so that what is saved is what a load gives. */
async function saved(page) {
  const read = () => page.evaluate(() => window.app.graphToPrompt());
  await load(page, JSON.parse(JSON.stringify((await read()).workflow)));
  await page.evaluate((view) => Object.assign(window.app.canvas.ds, view), FIRST_VIEW);
  const { workflow, output } = await read();
  return { workflow, prompt: output };
}

await answerLines(process.argv[2], 'canvas', 'en', async (page, description) => {
  await forget(page);
  await build(page, description);
  return saved(page);
});
