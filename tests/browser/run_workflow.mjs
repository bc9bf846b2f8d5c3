// Open one workflow in the graph editor, check it, run it, keep a screenshot, print what happened as JSON.
//
//   node run_workflow.mjs <host url> <workflow.json> <screenshot.png> [canvas|nodes2] [locale]
//
// PALIMPSEST_CHROMIUM is the browser, PALIMPSEST_NODE_PATH the folder whose node_modules holds playwright-core.
// The exit code is 0 whenever the report was printed; test_workflows.py judges it.

import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { createRequire } from 'node:module';

const require = createRequire(path.join(process.env.PALIMPSEST_NODE_PATH, 'package.json'));
const { chromium } = require('playwright-core');

const READY_MS = 90_000;
const DEFAULT_GRAPH_MS = 10_000;
const RUN_MS = 300_000;
const DRAWN_MS = 1_200; // the last previews and pictures are drawn after the run has ended
const OUR_REQUESTS = /\/(extensions|view|prompt|workflow_templates|object_info|i18n)\b/;
const EXPECTED_404 = /\/docs\/[^/]+\/[a-z]{2}(-[A-Z]{2})?\.md/; // a help page is asked for in the locale first
const FRONT_END_ONLY = ['Note', 'MarkdownNote', 'Reroute', 'PrimitiveNode'];

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
    viewport: { width: 1500, height: 950 },
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

/** Load the workflow once the editor has opened its own default graph, which would else replace it later. */
async function load(page, workflow) {
  await page.waitForFunction(() => window.app?.extensionManager && window.app?.graph, null, { timeout: READY_MS });
  const opened = () => window.app.extensionManager.workflow?.activeWorkflow && window.app.graph._nodes?.length;
  await page.waitForFunction(opened, null, { timeout: DEFAULT_GRAPH_MS }).catch((error) => {
    if (error.name !== 'TimeoutError') throw error; // older editors start empty
  });
  await page.evaluate((graph) => window.app.loadGraphData(graph, true, true, 'test'), workflow);
}

/** Node types the editor does not know, and the graph as the host would get it. */
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

async function main([url, workflowPath, screenshot, renderer = 'canvas', locale = 'en']) {
  const workflow = JSON.parse(fs.readFileSync(workflowPath, 'utf8'));
  await setUp(url, renderer, locale);
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'palimpsest-browser-'));
  const context = await openBrowser(profile);
  try {
    const page = context.pages()[0] ?? (await context.newPage());
    const seen = watch(page);
    await page.goto(url);
    await load(page, workflow);
    const { missing, titles, inputs, prompt } = await describe(page);
    const again = await roundTrip(page);
    const [result, detail] = missing.length ? ['not run', null] : await run(page);
    await page.waitForTimeout(DRAWN_MS);
    await page.screenshot({ path: screenshot });
    return { result, detail, missing, titles, inputs, prompt, again, ...seen };
  } finally {
    await context.close();
    fs.rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
  }
}

console.log(JSON.stringify(await main(process.argv.slice(2))));
