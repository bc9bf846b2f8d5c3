// The graph editor in a real browser, for run_workflows.mjs and author_workflows.mjs.
//
// PALIMPSEST_CHROMIUM is the browser, PALIMPSEST_NODE_PATH the folder whose node_modules holds playwright-core.

import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import readline from 'node:readline';
import { createRequire } from 'node:module';

const require = createRequire(path.join(process.env.PALIMPSEST_NODE_PATH, 'package.json'));
const { chromium } = require('playwright-core');

const READY_MS = 90_000;
const DEFAULT_GRAPH_MS = 10_000;
const OUR_REQUESTS = /\/(extensions|view|prompt|workflow_templates|object_info|i18n)\b/;
const EXPECTED_404 = /\/docs\/[^/]+\/[a-z]{2}(-[A-Z]{2})?\.md/; // a help page is asked for in the locale first

async function setUp(url, renderer, locale) {
  const settings = {
    'Comfy.TutorialCompleted': true,
    'Comfy.Workflow.Persist': false, // an old tab would replace the graph after it was loaded
    'Comfy.Minimap.Visible': false,
    'Comfy.VueNodes.Enabled': renderer === 'nodes2',
    'Comfy.Locale': locale,
  };
  for (const [name, value] of Object.entries(settings)) {
    const reply = await fetch(`${url}/api/settings/${name}`, { method: 'POST', body: JSON.stringify(value) });
    if (!reply.ok) throw new Error(`setting ${name}: status ${reply.status}`);
  }
}

function openBrowser(profile) {
  return chromium.launchPersistentContext(profile, {
    executablePath: process.env.PALIMPSEST_CHROMIUM,
    headless: false, // --headless=new below; playwright would add the old one
    viewport: { width: 2400, height: 1400 }, // the whole of a large graph, with its words: they vanish when it is small
    args: [
      '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
      '--disable-background-networking', '--disable-component-update', '--disable-sync',
    ],
  });
}

/** Collect what goes wrong in the page while the rest runs. */
function watch(page) {
  const seen = { pageErrors: [], badRequests: [] };
  page.on('pageerror', (error) => seen.pageErrors.push(String(error.stack ?? error).slice(0, 600)));
  page.on('response', (response) => {
    const address = response.url();
    if (response.status() < 400 || !OUR_REQUESTS.test(address) || EXPECTED_404.test(address)) return;
    seen.badRequests.push(`${response.status()} ${address}`);
  });
  return seen;
}

/** Wait until the editor has opened its own default graph, which would else replace ours later. */
async function waitUntilReady(page) {
  await page.waitForFunction(() => window.app?.extensionManager && window.app?.graph, null, { timeout: READY_MS });
  const opened = () => window.app.extensionManager.workflow?.activeWorkflow && window.app.graph._nodes?.length;
  await page.waitForFunction(opened, null, { timeout: DEFAULT_GRAPH_MS }).catch((error) => {
    if (error.name !== 'TimeoutError') throw error; // older editors start empty
  });
}

/** Open the editor in a fresh profile, give its page and what went wrong so far to `use`, and clean up. */
async function withEditor(url, renderer, locale, use) {
  await setUp(url, renderer, locale);
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'palimpsest-browser-'));
  const context = await openBrowser(profile);
  try {
    const page = context.pages()[0] ?? (await context.newPage());
    const seen = watch(page);
    await page.goto(url);
    await waitUntilReady(page);
    return await use(page, seen);
  } finally {
    await context.close();
    fs.rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
  }
}

/**
 * Open the editor once and answer lines of JSON from standard input, each with a line of JSON: what `answer(page,
 * question)` gives and what went wrong in the page meanwhile, or {"error": ...}. Ends when the input does.
 */
export function answerLines(url, renderer, locale, answer) {
  return withEditor(url, renderer, locale, async (page, seen) => {
    for await (const line of readline.createInterface({ input: process.stdin })) {
      const told = await answer(page, JSON.parse(line)).catch((error) => ({ error: String(error.stack ?? error) }));
      const wrong = Object.fromEntries(Object.entries(seen).map(([kind, list]) => [kind, list.splice(0)]));
      console.log(JSON.stringify({ ...told, ...wrong }));
    }
  });
}

/** Show a workflow (UI format) in the editor. */
export function load(page, workflow) {
  return page.evaluate((graph) => window.app.loadGraphData(graph, true, true, 'test'), workflow);
}

/** A page without memory: the editor hands the values of widgets on to a later node with the same number and names. */
export async function forget(page) {
  await page.reload();
  await waitUntilReady(page);
}

/** Bring the whole graph into view. */
export async function fitView(page) {
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView'));
  await page.waitForTimeout(600); // the view moves there smoothly
}

/** Put other values into widgets: by type and name, by name and value, by value, and then by name. */
export function standIn(page, standIns) {
  return page.evaluate(({ settings, numbers, strings, short }) => {
    const other = (node, { name, value }) => {
      const names = [[settings, `${node.type}.${name}`], [numbers, `${name}=${value}`], [strings, value]];
      const [found, key] = names.find(([table, each]) => each in table) ?? [];
      return name in short ? short[name] : found ? found[key] : value;
    };
    for (const node of window.app.graph.nodes ?? window.app.graph._nodes) {
      for (const widget of node.widgets ?? []) {
        const value = other(node, widget);
        if (value === widget.value) continue;
        widget.value = value;
        if (node.type === 'LoadImage') widget.callback?.(value); // shows it
      }
    }
  }, standIns);
}
