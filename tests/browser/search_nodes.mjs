// Ask the graph editor's own node search, the one behind its search box and its node library.
//
//   node search_nodes.mjs <host url>
//
// Reads lines {"query": words} and answers each with {"results": [[id, name], ...]}, in the order in which they are shown.

import { answerLines } from './editor.mjs';

const SHOWN = 64; // as many as the search box asks for

await answerLines(process.argv[2], 'canvas', 'en', async (page, { query }) => {
  const results = await page.evaluate(
    async ([words, limit]) => {
      const { $pinia } = document.querySelector('#vue-app').__vue_app__.config.globalProperties;
      const search = (text) => $pinia._s.get('nodeDef').nodeSearchService.searchNode(text, [], { limit });
      search('image'); // how often nodes are used is part of the order, and first read for a search
      await $pinia._s.get('nodeFrequency').loadNodeFrequencies();
      const found = search(words);
      return found.map((node) => [node.name, node.display_name]);
    },
    [query, SHOWN],
  );
  return { results };
});
