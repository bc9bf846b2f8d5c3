"""Every blueprint as a user meets it: offered by the host, placed by the editor, wired to three nodes, and run."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from browser.editor import Editor, needs_browser
from graphs.blueprints import BLUEPRINTS
from graphs.pocket import SHORT
from make_pictures import EXAMPLE_CAPTION, MASKED_EXAMPLE
from PIL import Image, ImageFilter

SCREENSHOTS = Path(__file__).resolve().parents[2] / "output" / "browser"
RECOLOURED = EXAMPLE_CAPTION.replace("red", "blue")
ASKED = {  # the pocket model's words, by blueprint
    "Change an action or pose in a photo": {
        "source_prompt": EXAMPLE_CAPTION, "edit_prompt": EXAMPLE_CAPTION.replace("standing", "sitting"),
    },
    "Recolour by a word": {"source_prompt": EXAMPLE_CAPTION, "edit_prompt": RECOLOURED, "words": "blue"},
    "Replace the background": {
        "source_prompt": EXAMPLE_CAPTION, "edit_prompt": EXAMPLE_CAPTION.replace("snow", "park"), "words": "park",
    },
    "Keep everything else (inpaint)": {"edit_prompt": RECOLOURED},
}  # fmt: skip
WITHOUT_MASK = "Change an action or pose in a photo"
REACH = 16  # pixels by which Keep Outside may widen a mask


def around(name: str) -> dict:
    """The graph that a user puts around a blueprint."""
    takes = BLUEPRINTS[name]()["inputs"]
    links = {input: source for input, source in takes.items() if source.split(".")[0] in ("checkpoint", "image")}
    return {
        "checkpoint": {"type": "CheckpointLoaderSimple", "at": [0, 0], "size": [300, 110],
                       "widgets": {"ckpt_name": "palimpsest_pocket.safetensors"}},
        "image": {"type": "LoadImage", "at": [0, 180], "size": [300, 400], "widgets": {"image": MASKED_EXAMPLE.name}},
        "edit": {"type": name, "at": [380, 0], "size": [400, 620], "inputs": links, "widgets": ASKED[name]},
        "save": {"type": "SaveImage", "at": [860, 0], "size": [400, 440],
                 "widgets": {"filename_prefix": "blueprint"}, "inputs": {"images": "edit.image"}},
    }  # fmt: skip


@pytest.fixture(scope="module", params=["canvas", "nodes2"])
def placed(request, server):
    """Every blueprint in its graph, as the editor makes it."""
    needs_browser()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with Editor("blueprints.mjs", server.url, request.param) as editor:
        shown = {name: str(SCREENSHOTS / f"blueprint {name}.{request.param}.png") for name in BLUEPRINTS}
        made = {name: editor.ask({"nodes": around(name), "screenshot": shown[name]}) for name in BLUEPRINTS}
    return made, request.param


def test_the_host_offers_them(client):
    offered = {entry["name"]: entry for entry in client.get_json("/global_subgraphs").values()}
    (pack,) = {offered[name]["info"]["node_pack"] for name in BLUEPRINTS}
    assert pack.startswith("custom_nodes.")


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_placed_and_runs(placed, client, name):
    (found, renderer), takes = placed, BLUEPRINTS[name]()["inputs"]
    made = found[name]
    assert made["pageErrors"] == []
    assert made["badRequests"] == []
    assert made["again"] == made["prompt"], "saving and loading changed the graph"
    for first, second in itertools.combinations(made["boxes"], 2):
        assert any(
            a[i] + a[i + 2] <= b[i] for a, b in ((first[1:], second[1:]), (second[1:], first[1:])) for i in (0, 1)
        )
    values = [value for node in made["prompt"].values() for value in node["inputs"].values()]
    assert all(word in values for word in ASKED[name].values()), "the words do not arrive inside"
    assert "mask" in takes or name == WITHOUT_MASK
    if renderer == "canvas":
        check_run(client, name, made["prompt"])


def check_run(client, name: str, prompt: dict) -> None:
    """Run what the editor made, in few steps: the picture changes, and only where the mask lets it."""
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in SHORT.items() if key in node["inputs"]}
    entry = client.queue(prompt)
    (saved,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    (data,) = client.images(entry, saved)
    edited, masked = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), np.asarray(Image.open(MASKED_EXAMPLE))
    source, mask = masked[..., :3], masked[..., 3] == 0
    assert edited.shape == source.shape
    inside = ~mask if name == "Replace the background" else mask
    changed = (edited != source).any(-1)
    assert changed[inside].mean() > 0.5
    if name != WITHOUT_MASK:
        reach = Image.fromarray(255 * inside.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * REACH + 1))
        assert not changed[np.asarray(reach) == 0].any(), "a pixel far outside of the mask moved"
