"""Every shipped workflow in a real browser, in both of the editor's renderers: loads whole, runs, saves unchanged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SCREENSHOTS = ROOT / "output" / "browser"
RENDERERS = ("canvas", "nodes2")


@pytest.fixture(scope="session")
def open_workflow(server):
    """A function that opens and runs a workflow in the browser and returns the report of run_workflow.mjs."""
    if not os.environ.get("PALIMPSEST_CHROMIUM"):
        pytest.skip(os.environ.get("PALIMPSEST_NO_BROWSER", "needs a browser: run `python dev.py test`"))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    def open_one(workflow: Path, renderer: str, locale: str = "en") -> dict:
        shot = SCREENSHOTS / f"{workflow.stem}.{renderer}.{locale}.png"
        script = Path(__file__).with_name("run_workflow.mjs")
        command = [shutil.which("node"), script, server.url, workflow, shot, renderer, locale]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=480)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return open_one


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs(open_workflow, workflow, renderer):
    report = open_workflow(workflow, renderer)
    assert report["missing"] == [], "node types the editor does not know"
    assert report["result"] == "execution_success", report["detail"]
    assert report["again"] == report["prompt"], "saving and loading changed the graph"
    assert report["pageErrors"] == []
    assert report["badRequests"] == []
