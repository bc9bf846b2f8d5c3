// Build blueprints in the graph editor from descriptions by names, and place installed ones in a graph as a user does.
//
//   node blueprints.mjs <host url> <canvas|nodes2>
//
// Reads a description from each line: {"nodes": {key: {"type", "at": [x, y], "size", "title"?, "widgets"?: {name: value},
// "inputs"?: {name: "key.output"}}}}. A node's type may be the name of an installed blueprint.
// With "blueprint": {"name", "inputs": [{"name", "label"?, "to": ["key.input"]}], "output": {"name", "from": "key.output"}}
// all nodes go into one subgraph and the answer is {"workflow"}, of which make_blueprints.py makes the file. Without, it is
// {"prompt": API format, "again": the same after saving and loading, "boxes"}; "screenshot" says where to show it.

import { answerLines, fitView, forget } from './editor.mjs';

/** Make the nodes and links; an unknown type, widget or socket is an error. */
function build(page, nodes) {
  return page.evaluate((wanted) => {
    const { app, LiteGraph } = window;
    app.graph.clear();
    /** An installed blueprint, as the node library places it. */
    const placed = (name) => {
      const store = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('subgraph');
      const found = store.subgraphBlueprints.find((each) => each.display_name === name);
      if (!found) throw new Error(`no node type or blueprint ${name}`);
      const { nodes: inside, definitions } = store.getBlueprint(found.name);
      const items = { nodes: inside, subgraphs: definitions.subgraphs };
      return app.canvas._deserializeItems(items, { position: [0, 0] }).nodes.values().next().value;
    };
    const find = (list, name, what) => {
      const index = (list ?? []).findIndex((item) => item.name === name);
      if (index < 0) throw new Error(`no ${what} ${name}`);
      return index;
    };
    const made = {};
    for (const [key, { type, at, size, title, widgets }] of Object.entries(wanted)) {
      const node = LiteGraph.createNode(type) ?? placed(type);
      if (!node.graph) app.graph.add(node);
      made[key] = node;
      node.pos = at;
      if (title) node.title = title;
      for (const [name, value] of Object.entries(widgets ?? {})) {
        node.widgets[find(node.widgets, name, `widget of ${type}`)].value = value;
      }
      node.setSize([size[0], Math.max(size[1], node.computeSize()[1])]);
    }
    for (const [key, { inputs }] of Object.entries(wanted)) {
      for (const [name, source] of Object.entries(inputs ?? {})) {
        const [from, output] = source.split('.');
        const slot = find(made[from].outputs, output, `output of ${from}`);
        made[from].connect(slot, made[key], find(made[key].inputs, name, `input of ${key}`));
      }
    }
  }, nodes);
}

/** Put all nodes into one subgraph and give it its inputs and its output; the graph as the editor serializes it. */
function intoBlueprint(page, { name, inputs, output }, keys) {
  return page.evaluate(({ name, inputs, output, keys }) => {
    const { app } = window;
    const places = Object.fromEntries(app.graph._nodes.map((node, i) => [keys[i], String([...node.pos])]));
    for (const node of app.graph._nodes) node.updateArea(app.canvas.ctx); // else only a drawn frame says how far it goes
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
    node.setSize([Math.max(400, node.computeSize()[0]), node.computeSize()[1]]);
    return { workflow: app.graph.serialize() };
  }, { name, inputs, output, keys });
}

/** What the host would get of the graph, now and after saving and loading, and where its nodes are drawn. */
function placement(page) {
  return page.evaluate(async () => {
    const { app } = window;
    const { workflow, output } = await app.graphToPrompt();
    await app.loadGraphData(JSON.parse(JSON.stringify(workflow)), true, true, 'again');
    const again = (await app.graphToPrompt()).output;
    return { prompt: output, again, boxes: app.graph._nodes.map((node) => [node.title, ...node.getBounding()]) };
  });
}

const [url, renderer] = process.argv.slice(2);
let fresh = true; // a page that has held no graph yet has nothing to forget

await answerLines(url, renderer, 'en', async (page, { nodes, blueprint, screenshot }) => {
  if (!fresh) await forget(page);
  fresh = false;
  await build(page, nodes);
  if (blueprint) return intoBlueprint(page, blueprint, Object.keys(nodes));
  const found = await placement(page);
  await fitView(page);
  await page.screenshot({ path: screenshot });
  return found;
});
