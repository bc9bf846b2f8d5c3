"""Every blueprint as a user meets it: offered by the host, placed by the editor, wired to four nodes, and run."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from browser.editor import Editor
from browser.test_workflows import SCREENSHOTS, overlapping, without_titles
from graphs import parts
from graphs.blueprints import BLUEPRINTS
from make_pictures import EXAMPLE
from PIL import Image, ImageFilter

SCENE = {"source_prompt": parts.SOURCE, "edit_prompt": parts.RECOLOURED, "words": "blue"}
ASKED = {  # the pocket model's words, by blueprint
    "Change an action or pose in a photo": {"source_prompt": parts.SOURCE, "edit_prompt": parts.EDIT},
    "Recolour by a word": SCENE,
    "Replace the background": SCENE
    | {"edit_prompt": "a red cat standing on the right in the park", "words": "in the park"},
    "Keep everything else (inpaint)": {"edit_prompt": parts.RECOLOURED},
}
CHANGES_OUTSIDE = {"Change an action or pose in a photo"}  # has no mask
SHORT = {"steps": 4}


def around(name: str) -> dict:
    """The graph that a user puts around a blueprint."""
    takes = BLUEPRINTS[name]()["inputs"]
    links = {input: source for input, source in takes.items() if source.split(".")[0] in ("checkpoint", "image")}
    return {
        "nodes": {
            "checkpoint": {"type": "CheckpointLoaderSimple", "at": [0, 0], "size": [300, 110],
                           "widgets": {"ckpt_name": parts.CHECKPOINT}},
            "image": {"type": "LoadImage", "at": [0, 180], "size": [300, 400],
                      "widgets": {"image": parts.MASKED_PICTURE}},
            "edit": {"type": name, "at": [380, 0], "size": [400, 620], "inputs": links, "widgets": ASKED[name]},
            "save": {"type": "SaveImage", "at": [860, 0], "size": [400, 440],
                     "widgets": {"filename_prefix": "blueprint"}, "inputs": {"images": "edit.image"}},
        },
        "groups": [],
    }  # fmt: skip


@pytest.fixture(scope="module")
def placed(server):
    """Every blueprint in its graph, as the editor makes it."""
    if not os.environ.get("PALIMPSEST_CHROMIUM"):
        pytest.skip(os.environ.get("PALIMPSEST_NO_BROWSER", "needs a browser: run `python dev.py test`"))
    with Editor("author_workflows.mjs", server.url) as editor:
        return {name: editor.ask(around(name)) for name in BLUEPRINTS}


@pytest.fixture(scope="module")
def opened(server, placed):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with Editor("run_workflows.mjs", server.url, "nodes2", "en") as editor:
        yield editor


def test_the_host_offers_them(client):
    offered = {entry["name"]: entry for entry in client.get_json("/global_subgraphs").values()}
    packs = {offered[name]["info"]["node_pack"] for name in BLUEPRINTS}
    assert len(packs) == 1
    assert packs.pop().startswith("custom_nodes.")


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_placed_and_runs(placed, opened, client, tmp_path, name):
    made = placed[name]
    assert made["pageErrors"] == []
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps(made["workflow"]), encoding="utf-8")
    screenshot = str(SCREENSHOTS / f"blueprint {name}.png")
    report = opened.ask({"workflow": str(graph), "screenshot": screenshot, "run": True, "values": SHORT})
    assert report["missing"] == []
    assert report["again"] == report["prompt"], "saving and loading changed the graph"
    assert without_titles(report["prompt"]) == without_titles(made["prompt"])
    assert overlapping(report["boxes"]) == []
    assert report["pageErrors"] == []
    assert report["result"] == "execution_success", report["detail"]
    entry = client.wait(report["detail"]["prompt_id"])
    (data,) = (each for key in entry["outputs"] if made["prompt"][key]["class_type"] == "SaveImage"
               for each in client.images(entry, key))  # fmt: skip
    edited = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    masked = np.asarray(Image.open(EXAMPLE.with_name(parts.MASKED_PICTURE)))
    source, mask = masked[..., :3], masked[..., 3] == 0
    assert edited.shape == source.shape
    inside = ~mask if name == "Replace the background" else mask
    changed = (edited != source).any(-1)
    assert changed[inside].mean() > 0.5
    if name not in CHANGES_OUTSIDE:
        assert not changed[~grown(inside, 8)].any(), "a pixel far outside of the mask moved"


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask, larger by some pixels in each direction: Keep Outside grows and feathers by 4."""
    light = Image.fromarray(255 * mask.astype(np.uint8))
    return np.asarray(light.filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0
