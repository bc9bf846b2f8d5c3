"""Every shipped workflow in a real browser, in both of the editor's renderers: loads whole, runs, saves unchanged."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from graphs.shipped import MAKES_TUNING, SHORT, WORKFLOWS, api_form, provide_files

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "output" / "browser"
RENDERERS = ("canvas", "nodes2")


@pytest.fixture(scope="session")
def open_workflow(server, client):
    """A function that opens and runs a workflow in the browser, made short, and returns run_workflow.mjs's report."""
    if not os.environ.get("PALIMPSEST_CHROMIUM"):
        pytest.skip(os.environ.get("PALIMPSEST_NO_BROWSER", "needs a browser: run `python dev.py test`"))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    def open_one(workflow: Path, renderer: str, locale: str = "en") -> dict:
        provide_files(client, api_form(workflow.stem))
        shot = SCREENSHOTS / f"{workflow.stem}.{renderer}.{locale}.png"
        script = Path(__file__).with_name("run_workflow.mjs")
        command = [shutil.which("node"), script, server.url, workflow, shot, renderer, locale, json.dumps(SHORT)]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=480)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return open_one


def without_titles(prompt: dict) -> dict:
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}


def overlapping(boxes: list[list]) -> list[tuple[str, str]]:
    """Pairs of nodes that lie on each other by more than a pixel."""
    return [
        (a, b)
        for (a, *first), (b, *second) in itertools.combinations(boxes, 2)
        if all(min(first[i + 2], second[i + 2]) - max(first[i], second[i]) > 1 for i in (0, 1))
    ]


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs(open_workflow, workflow, renderer):
    report = open_workflow(workflow, renderer)
    assert report["missing"] == [], "node types the editor does not know"
    assert report["result"] == "execution_success", report["detail"]
    assert report["again"] == report["prompt"], "saving and loading changed the graph"
    assert without_titles(report["prompt"]) == without_titles(api_form(workflow.stem)), "tests/data/api is out of date"
    assert len(report["boxes"]) == len(report["titles"])
    assert overlapping(report["boxes"]) == []
    assert report["pageErrors"] == []
    assert report["badRequests"] == []


def test_the_graph_editor_shows_chinese(open_workflow):
    (workflow,) = (path for path in WORKFLOWS if path.stem == MAKES_TUNING)
    report = open_workflow(workflow, "canvas", "zh")
    names = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert report["result"] == "execution_success", report["detail"]
    assert {names["PalimpsestApplyKV"]["display_name"], names["PalimpsestInvert"]["display_name"]} < set(
        report["titles"]
    )
    shown = {name for node in report["inputs"] for name in node}
    assert {item["name"] for item in names["PalimpsestApplyKV"]["inputs"].values()} <= shown | {"遮罩"}
