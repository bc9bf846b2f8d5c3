// The editor asks the host once for the lists that loaders choose from. What a node of ours has saved since then stands
// in them after its run, without a refresh by hand.

import { app } from '../../../scripts/app.js';
import { api } from '../../../scripts/api.js';

const known = new Set(); // a node that the host takes from its cache tells again what it saved
let isNew = false;

function note({ detail }) {
  for (const name of detail?.output?.palimpsest_saved ?? []) {
    isNew ||= !known.has(name);
    known.add(name);
  }
}

async function refresh() {
  if (!isNew) return;
  isNew = false;
  const reload = app.reloadNodeDefs ?? app.refreshComboInNodes; // older editors have the second alone
  await reload.call(app).catch((error) => console.warn('palimpsest: lists of files were not refreshed', error));
}

app.registerExtension({
  name: 'palimpsest.refresh_lists',
  setup() {
    api.addEventListener('executed', note);
    for (const end of ['execution_success', 'execution_error', 'execution_interrupted']) {
      api.addEventListener(end, refresh);
    }
  },
});
