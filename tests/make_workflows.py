"""Build the shipped workflows in the real graph editor, so that they are saved exactly as the editor saves.

    python tests/make_workflows.py          writes workflows/*.json and, in API format, tests/data/api/*.json

Needs a browser as the browser tests do. A graph is described here by names; values that are not given keep the nodes'
defaults. The thumbnails come from make_pictures.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows"
API = ROOT / "tests" / "data" / "api"

CHECKPOINT = "palimpsest_pocket.safetensors"
PICTURE = "palimpsest_example.png"
TUNING = "palimpsest_example"  # Save KV adds _00001.safetensors
SOURCE = "a red cat standing on the right in the snow"
EDIT = "a red cat sitting on the right in the snow"
OTHER_EDIT = "a red cat lying on the right in the snow"
STEPS, GUIDANCE, SCHEDULER = 20, 3.0, "normal"

COLOURS = {"1": "#3f789e", "2": "#b58b2a", "3": "#3f7a4a"}  # of the groups
NOTE = {"color": "#432", "bgcolor": "#653"}

START_HERE = """## Change what someone does, keep who it is

1. **Load Checkpoint**: your SD 1.5 or SDXL model.
2. **Load Image**: your photo, scaled to the model's size (512 px for SD 1.5, 1024 px for SDXL).
3. **The picture as it is**: describe the photo.
4. **The picture as it should be**: the same words with another action.
5. Queue. The first run learns the photo. As long as you change only group 3, later runs only sample.

The checkpoint and the picture that are set here belong to the pack's own small test model (128 px)."""

SETTINGS = """## Values for real models

| | SD 1.5, 512 px | SDXL, 1024 px |
|---|---|---|
| steps (Invert Picture **and** KSampler) | 30 to 50 | 30 |
| guidance (Tune KV) **=** cfg (KSampler) | 4 to 7.5 | 4 to 7 |
| source_guidance (Apply KV): begin at | 3 | 3 |
| memory and file, per step | 28 MB | 220 MB |
| the same with keep_source | 55 MB | 440 MB |

Memory is the computer's, not the graphics card's. 30 steps of SDXL with keep_source are 13 GB; mode *recompute* needs
no keep_source.

Steps, scheduler and guidance must agree between the nodes: noise found with 20 steps belongs to 20 steps."""

KNOBS = """## Not right yet?

- **Wrong pose**: raise start_percent (0.1 to 0.4), or lower source_guidance.
- **Coat, clothes or colours missing**: raise source_guidance (Apply KV) by steps of 2.
- **Colours burnt in, mud**: lower source_guidance.
- **The tuned reconstruction is off**: more inner_steps; a prompt that fits the photo better.

Save KV has written the tuning to models/palimpsest_kv. The workflow *Edit again from a saved tuning* takes it from
there."""

START_AGAIN = """## Edit a photo again without learning it again

1. **Load Checkpoint**, **Load Image**, **The picture as it is**: the same as when you tuned.
2. **Load KV**: the file that Save KV wrote (models/palimpsest_kv; press R to list new ones).
3. **The picture as it should be**: any new action.

The saved file is the tuning; the start noise is found anew by Invert Picture, which takes one model call a step.
Its test reconstruction is off (reconstruct_at 0).

Keep steps, scheduler and cfg as they were when you tuned, and the picture at the same size."""


def text(title: str, at: list[int], value: str, *, height: int = 110) -> dict:
    return {
        "type": "CLIPTextEncode", "title": title, "at": at, "size": [380, height],
        "widgets": {"text": value}, "inputs": {"clip": "checkpoint.CLIP"},
    }  # fmt: skip


def note(title: str, at: list[int], size: list[int], value: str) -> dict:
    return {"type": "MarkdownNote", "title": title, "at": at, "size": size, "note": value, "colour": NOTE}


def picture_nodes() -> dict:
    """Group 1: the model, the picture, and what it shows."""
    return {
        "checkpoint": {"type": "CheckpointLoaderSimple", "at": [40, 80], "size": [380, 110],
                       "widgets": {"ckpt_name": CHECKPOINT}},
        "image": {"type": "LoadImage", "at": [40, 250], "size": [380, 400], "widgets": {"image": PICTURE}},
        "encode": {"type": "VAEEncode", "at": [40, 720], "size": [380, 60],
                   "inputs": {"pixels": "image.IMAGE", "vae": "checkpoint.VAE"}},
        "source": text("The picture as it is", [40, 850], SOURCE),
        "negative": text("Negative prompt", [40, 1030], ""),
    }  # fmt: skip


def invert(at: list[int], **widgets) -> dict:
    return {
        "type": "PalimpsestInvert", "at": at, "size": [380, 350],
        "widgets": {"steps": STEPS, "scheduler": SCHEDULER, **widgets},
        "inputs": {"model": "checkpoint.MODEL", "latent": "encode.LATENT", "positive": "source.CONDITIONING",
                   "negative": "negative.CONDITIONING", "vae": "checkpoint.VAE"},
    }  # fmt: skip


def edit_nodes(left: int, kv: str, prompt: str) -> dict:
    """Group 3: sample from the inverted noise with the tuned keys and values and another prompt."""
    right = left + 440
    return {
        "edit": text("The picture as it should be", [left, 80], prompt),
        "apply": {"type": "PalimpsestApplyKV", "at": [left, 260], "size": [380, 280],
                  "inputs": {"model": "checkpoint.MODEL", "kv": kv}},
        "sample": {"type": "KSamplerAdvanced", "at": [left, 640], "size": [380, 350],
                   "widgets": {"add_noise": "disable", "noise_seed": 0, "control_after_generate": "fixed",
                               "steps": STEPS, "cfg": GUIDANCE, "sampler_name": "euler", "scheduler": SCHEDULER,
                               "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"},
                   "inputs": {"model": "apply.MODEL", "positive": "edit.CONDITIONING",
                              "negative": "negative.CONDITIONING", "latent_image": "invert.noise"}},
        "decode": {"type": "VAEDecode", "at": [right, 80], "size": [380, 60],
                   "inputs": {"samples": "sample.LATENT", "vae": "checkpoint.VAE"}},
        "save": {"type": "SaveImage", "title": "The edited picture", "at": [right, 210], "size": [380, 440],
                 "widgets": {"filename_prefix": "palimpsest_edit"}, "inputs": {"images": "decode.IMAGE"}},
    }  # fmt: skip


def group(title: str, left: int, width: int, height: int = 1180) -> dict:
    return {"title": title, "bounding": [left, 0, width, height], "colour": COLOURS[title[0]]}


def edit_an_action() -> dict:
    learn = {
        "invert": invert([500, 80]),
        "tune": {"type": "PalimpsestTuneKV", "at": [500, 560], "size": [380, 460],
                 "widgets": {"guidance": GUIDANCE},
                 "inputs": {"model": "checkpoint.MODEL", "trajectory": "invert.trajectory",
                            "positive": "source.CONDITIONING", "negative": "negative.CONDITIONING",
                            "vae": "checkpoint.VAE"}},
        "keep": {"type": "PalimpsestSaveKV", "at": [940, 80], "size": [380, 110],
                 "widgets": {"filename": TUNING}, "inputs": {"kv": "tune.kv"}},
        "rebuilt": {"type": "VAEDecode", "at": [940, 280], "size": [380, 60],
                    "inputs": {"samples": "tune.reconstruction", "vae": "checkpoint.VAE"}},
        "look": {"type": "PreviewImage", "title": "The picture, rebuilt", "at": [940, 420], "size": [380, 400],
                 "inputs": {"images": "rebuilt.IMAGE"}},
    }  # fmt: skip
    notes = {
        "start": note("Start here", [-480, 40], [440, 330], START_HERE),
        "settings": note("Values for real models", [-480, 430], [440, 400], SETTINGS),
        "knobs": note("Not right yet?", [1840, 730], [380, 300], KNOBS),
    }
    return {
        "nodes": {**picture_nodes(), **learn, **edit_nodes(1400, "tune.kv", EDIT), **notes},
        "groups": [
            group("1 Your picture", 0, 460),
            group("2 Learn it", 480, 880),
            group("3 Edit it", 1380, 860),
        ],
    }


def edit_again() -> dict:
    learned = {
        "invert": invert([500, 80], reconstruct_at=0.0),
        "load": {"type": "PalimpsestLoadKV", "at": [500, 560], "size": [380, 160],
                 "widgets": {"file": f"{TUNING}_00001.safetensors"}},
    }  # fmt: skip
    notes = {
        "start": note("Start here", [-480, 40], [440, 330], START_AGAIN),
        "knobs": note("Not right yet?", [1400, 730], [380, 250], KNOBS.partition("\n\nSave KV")[0]),
    }
    return {
        "nodes": {**picture_nodes(), **learned, **edit_nodes(960, "load.kv", OTHER_EDIT), **notes},
        "groups": [
            group("1 Your picture", 0, 460),
            group("2 What was learned", 480, 440),
            group("3 Edit it", 940, 860),
        ],
    }


GRAPHS = {
    "Edit an action in a photo (KV Inversion)": edit_an_action,
    "Edit again from a saved tuning (KV Inversion)": edit_again,
}


def author(url: str, description: dict, browser) -> dict:
    """The graph as the editor saves it: {"workflow": UI format, "prompt": API format}."""
    script = ROOT / "tests" / "browser" / "author_workflow.mjs"
    env = {**os.environ, "PALIMPSEST_CHROMIUM": str(browser.chromium), "PALIMPSEST_NODE_PATH": str(browser.node_path)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "description.json"
        path.write_text(json.dumps(description), encoding="utf-8")
        command = [shutil.which("node"), script, url, path]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, env=env)
    if done.returncode:
        raise RuntimeError(f"the editor could not build the graph:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(value: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def main() -> None:
    from conftest import dev

    place, browser = dev.set_up(None), dev.prepare_browser()
    with dev.open_host(place, "workflows", None) as host:
        for name, describe in GRAPHS.items():
            made = author(host.url, describe(), browser)
            made["workflow"]["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, name))  # the editor draws a new one each time
            write(made["workflow"], WORKFLOWS / f"{name}.json")
            write(made["prompt"], API / f"{name}.json")


if __name__ == "__main__":
    main()
