// Build graphs in the graph editor from descriptions by names, and give each as the editor saves it:
// {"workflow": UI format, "prompt": API format}. tests/make_workflows.py writes the descriptions and keeps the results.
//
//   node author_workflows.mjs <host url>
//
// Reads a description from each line: {"nodes": {key: {"type", "size": [w, h], "title"?, "colour"?, "widgets"?: {name: value},
// "unset"?: [names of widgets that take the first of what a host lists], "models"?: what the editor offers to download,
// "note"?: the text of a note, "inputs"?: {name: "key.output"}}}, "notes": [keys], "groups": [{"title", "colour",
// "columns": [[keys]]}]}

import { answerLines, forget, load } from './editor.mjs';

const FIRST_VIEW = { scale: 0.65, offset: [580, 180] }; // the left upper part, large enough to read
const ROOM = { titleBar: 30, groupTitle: 44, side: 30, between: 60, below: 60, belowGrowing: 200 };
const GROWING = /^Palimpsest|^MarkdownNote$/; // ours tell reports below, notes are as tall as their words

/** Make the nodes and links; an unknown type, widget or socket is an error. */
function build(page, description) {
  return page.evaluate(({ description: { nodes, notes, groups }, room, growing }) => {
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
      if (wanted.title) node.title = wanted.title;
      if (wanted.colour) Object.assign(node, wanted.colour);
      if (wanted.models) node.properties.models = wanted.models;
      for (const [name, value] of Object.entries(wanted.widgets ?? {})) {
        node.widgets[find(node.widgets, name, `widget of ${wanted.type}`)].value = value;
      }
      if (wanted.note) node.widgets[0].value = wanted.note;
    }
    for (const [key, wanted] of Object.entries(nodes)) {
      for (const [name, source] of Object.entries(wanted.inputs ?? {})) {
        const [from, output] = source.split('.');
        if (!made[from]) throw new Error(`${key}.${name}: no node ${from}`);
        const slot = find(made[from].outputs, output, `output of ${from}`);
        made[from].connect(slot, made[key], find(made[key].inputs, name, `input of ${key}`));
      }
    }
    for (const [key, { size }] of Object.entries(nodes)) {
      made[key].setSize([size[0], Math.max(size[1], made[key].computeSize()[1])]); // growing inputs are there by now
    }

    /** Stack nodes from (left, top); the y where the stack ends. */
    const stack = (keys, left, top) => {
      for (const key of keys) {
        const node = made[key];
        node.pos = [left, top + room.titleBar];
        top += room.titleBar + node.size[1] + (new RegExp(growing).test(node.type) ? room.belowGrowing : room.below);
      }
      return top;
    };
    const widest = (keys) => Math.max(...keys.map((key) => made[key].size[0]));
    stack(notes, -room.between - widest(notes), 0);
    let left = 0;
    for (const { title, colour, columns } of groups) {
      const group = new LiteGraph.LGraphGroup(title);
      let right = left + room.side;
      const ends = [];
      for (const keys of columns) {
        ends.push(stack(keys, right, room.groupTitle));
        right += widest(keys) + room.between;
      }
      group.pos = [left, 0];
      group.size = [right - room.between + room.side - left, Math.max(...ends)];
      group.color = colour;
      app.graph.add(group);
      left += group.size[0] + room.side;
    }
    return Object.fromEntries(Object.entries(made).map(([key, node]) => [key, String(node.id)]));
  }, { description, room: ROOM, growing: GROWING.source });
}

/** The graph in both formats; loaded once more first, so that what is saved is what a load gives. */
async function saved(page) {
  const read = () => page.evaluate(() => window.app.graphToPrompt());
  await load(page, JSON.parse(JSON.stringify((await read()).workflow)));
  await page.evaluate((view) => Object.assign(window.app.canvas.ds, view), FIRST_VIEW);
  const { workflow, output } = await read();
  return { workflow, prompt: output };
}

/** Leave out what this host happens to list: an editor takes the first of what its own host lists for null. */
async function unset(page, nodes, ids, { workflow, prompt }) {
  for (const [key, { unset: names }] of Object.entries(nodes)) {
    for (const name of names ?? []) {
      const id = ids[key];
      const index = await page.evaluate(([node, widget]) => {
        const { widgets } = window.app.graph._nodes.find((each) => String(each.id) === node);
        return widgets.filter((each) => each.serialize !== false).findIndex((each) => each.name === widget);
      }, [id, name]);
      workflow.nodes.find((node) => String(node.id) === id).widgets_values[index] = null;
      delete prompt[id].inputs[name];
    }
  }
  return { workflow, prompt };
}

await answerLines(process.argv[2], 'canvas', 'en', async (page, description) => {
  await forget(page);
  const ids = await build(page, description);
  return unset(page, description.nodes, ids, await saved(page));
});
