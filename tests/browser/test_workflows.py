"""Every shipped workflow in a real browser: loads whole and saves unchanged in both renderers, runs in one of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from browser.editor import Editor, needs_browser
from graphs.pocket import OF_OTHER_KINDS, SHORT, stand_ins
from graphs.shipped import MAKERS, MAKES_TUNING, WORKFLOWS, api_form, check_pictures, pocket_form, provide_files
from graphs.titles import title_of

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "output" / "browser"
RENDERERS = ("canvas", "nodes2")
MARGIN = 24  # between any two nodes, in the graph's units
UNSET = {
    "PalimpsestLoadMultimodalEncoder": "folder",
    "PalimpsestTrainTextControl": "folder",
    "PalimpsestLoadMGIE": "folder",
    "LoraLoader": "lora_name",
}  # where a host lists something, the editor takes its first; others: file
# Those that write a file for others in the first renderer, so that it is there for them.
RUNS_IN = {path: RENDERERS[path.stem not in MAKERS.values() and i % 2] for i, path in enumerate(WORKFLOWS)}


def open_editor(server, renderer: str, locale: str) -> Editor:
    needs_browser()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return Editor("run_workflows.mjs", server.url, renderer, locale)


@pytest.fixture(scope="module", params=RENDERERS)
def editor(request, server):
    """(the graph editor, opened once, the renderer that it draws with)."""
    with open_editor(server, request.param, "en") as opened:
        yield opened, request.param


def question(workflow: Path, name: str, *, run: bool) -> dict:
    asked = {"workflow": str(workflow), "screenshot": str(SCREENSHOTS / f"{workflow.stem}.{name}.png"), "run": run}
    return asked | {"stand_ins": stand_ins(workflow.stem, SHORT)}


def without_titles(prompt: dict) -> dict:
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}


def as_shipped(prompt: dict) -> dict:
    """Without titles, and without what a host lists first."""
    return {
        key: {"class_type": node["class_type"], "inputs": {
            name: value for name, value in node["inputs"].items() if name != UNSET.get(node["class_type"], "file")
        }}
        for key, node in prompt.items()
    }  # fmt: skip


def closer_than(margin: float, boxes: list[list]) -> list[tuple[str, str]]:
    """Pairs of nodes with less than a margin between them."""
    return [
        (a, b)
        for (a, *first), (b, *second) in itertools.combinations(boxes, 2)
        if all(min(first[i + 2], second[i + 2]) - max(first[i], second[i]) > -margin for i in (0, 1))
    ]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_loads_runs_and_saves(editor, client, workflow):
    opened, renderer = editor
    prompt, editable = pocket_form(workflow.stem, short=True), title_of(workflow.stem) not in OF_OTHER_KINDS
    runs = editable and RUNS_IN[workflow] == renderer  # house/test_workflows.py runs them all
    provide_files(client, prompt)
    report = opened.ask(question(workflow, f"{renderer}.en", run=runs))
    assert report["missing"] == [], "node types the editor does not know"
    assert report["again"] == report["prompt"], "saving and loading changed the graph"
    assert as_shipped(report["prompt"]) == as_shipped(api_form(workflow.stem)), "tests/data/api is out of date"
    if editable:
        ran = without_titles(report["ran"])
        assert ran == without_titles(prompt), "the editor puts in other values than pocket.py"
    assert len(report["boxes"]) == len(report["titles"])
    assert closer_than(MARGIN, report["boxes"]) == []
    assert closer_than(0, report["wider"]) == [], "nodes lie on each other where the fonts are wider"
    assert report["pageErrors"] == []
    assert report["badRequests"] == []
    if runs:
        assert report["result"] == "execution_success", report["detail"]
        check_pictures(client, prompt, client.wait(report["detail"]["prompt_id"]))


def test_the_graph_editor_shows_chinese(server, client):
    (workflow,) = (path for path in WORKFLOWS if path.stem == MAKES_TUNING)
    with open_editor(server, "canvas", "zh") as opened:
        report = opened.ask(question(workflow, "canvas.zh", run=False))
    names = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert as_shipped(report["prompt"]) == as_shipped(api_form(workflow.stem)), "the graph is another in Chinese"
    assert {names["PalimpsestApplyKV"]["display_name"], names["PalimpsestInvert"]["display_name"]} < set(
        report["titles"]
    )
    shown = {name for node in report["inputs"] for name in node}
    assert {item["name"] for item in names["PalimpsestApplyKV"]["inputs"].values()} <= shown | {"遮罩"}
