// Build graphs in the graph editor from descriptions by names, and give each as the editor saves it:
// {"workflow": UI format, "prompt": API format}. tests/make_workflows.py writes the descriptions and keeps the results.
//
//   node author_workflows.mjs <host url>
//
// Reads a description from each line: {"nodes": {key: {"type", "at": [x, y], "size"?: [w, h], "title"?, "colour"?, "widgets"?: {name: value},
// "note"?: the text of a note, "inputs"?: {name: "key.output"}}}, "groups": [{"title", "bounding": [x, y, w, h], "colour"}],
// "blueprint"?: {"name", "inputs": [{"name", "label"?, "to": ["key.input"]}], "output": {"name", "from": "key.output"}}}
// A node's type may be the name of an installed blueprint. With `blueprint` all nodes go into one, with these inputs.

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
    /** An installed blueprint, as the node library places it. */
    const placed = (name) => {
      const store = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('subgraph');
      const found = store.subgraphBlueprints.find((each) => each.display_name === name);
      if (!found) return null;
      const { nodes: inside, definitions } = store.getBlueprint(found.name);
      const added = app.canvas._deserializeItems({ nodes: inside, subgraphs: definitions.subgraphs }, { position: [0, 0] });
      return added.nodes.values().next().value;
    };
    for (const [key, wanted] of Object.entries(nodes)) {
      const node = LiteGraph.createNode(wanted.type) ?? placed(wanted.type);
      if (!node) throw new Error(`no node type ${wanted.type}`);
      if (!node.graph) app.graph.add(node);
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

/** Put all nodes into one subgraph and give it its inputs and its output. */
function intoBlueprint(page, { name, inputs, output }, keys) {
  return page.evaluate(({ name, inputs, output, keys }) => {
    const { app } = window;
    const places = Object.fromEntries(app.graph._nodes.map((node, i) => [keys[i], String([...node.pos])]));
    const { subgraph, node } = app.graph.convertToSubgraph(new Set(app.graph._nodes));
    const inside = (key) => subgraph.nodes.find((each) => String([...each.pos]) === places[key]);
    for (const recommended of [...subgraph.inputs]) subgraph.removeInput(recommended);
    for (const { name: called, label, to } of inputs) {
      let made = null;
      for (const target of to) {
        const [key, wanted] = target.split('.');
        const slot = inside(key).inputs.find((each) => each.name === wanted);
        made ??= subgraph.addInput(called, slot.type);
        if (!made.connect(slot, inside(key))) throw new Error(`${called} cannot be linked to ${target}`);
      }
      if (label) subgraph.renameInput(made, label);
    }
    const [key, wanted] = output.from.split('.');
    const slot = inside(key).outputs.find((each) => each.name === wanted);
    subgraph.addOutput(output.name, slot.type).connect(slot, inside(key));
    subgraph.name = node.title = name;
    node.setSize(node.computeSize());
  }, { name, inputs, output, keys });
}

/** The graph in both formats; loaded once more first, so that what is saved is what a load gives. */
async function saved(page) {
  const read = () => page.evaluate(() => window.app.graphToPrompt());
  await load(page, JSON.parse(JSON.stringify((await read()).workflow)));
  await page.evaluate((view) => Object.assign(window.app.canvas.ds, view), FIRST_VIEW);
  const { workflow, output } = await read();
  if (workflow.definitions) { // a prompt's workflow leaves out the inputs of a blueprint's widgets
    const whole = await page.evaluate(() => window.app.graph.serialize());
    return { workflow: { ...workflow, nodes: whole.nodes, definitions: whole.definitions }, prompt: output };
  }
  return { workflow, prompt: output };
}

await answerLines(process.argv[2], 'canvas', 'en', async (page, description) => {
  await forget(page);
  await build(page, description);
  if (description.blueprint) await intoBlueprint(page, description.blueprint, Object.keys(description.nodes));
  return saved(page);
});
