// Bypass a node of a workflow: {"workflow": UI format, "type": of the node} -> {"before", "bypassed"}, each the links of
// the API format as {"<class>.<input>": "<class>[<output>]"}.
//
//   node bypass.mjs <host url>

import { answerLines, load } from './editor.mjs';

const [url] = process.argv.slice(2);
await answerLines(url, 'canvas', 'en', async (page, { workflow, type }) => {
  await load(page, workflow);
  return page.evaluate(async (type) => {
    const links = async () => {
      const { output } = await window.app.graphToPrompt();
      const found = {};
      for (const node of Object.values(output)) {
        for (const [name, value] of Object.entries(node.inputs)) {
          if (Array.isArray(value)) found[`${node.class_type}.${name}`] = `${output[value[0]]?.class_type}[${value[1]}]`;
        }
      }
      return found;
    };
    const before = await links();
    window.app.graph._nodes.find((node) => node.type === type).mode = 4;
    return { before, bypassed: await links() };
  }, type);
});
