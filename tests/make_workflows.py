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
PICTURE, SECOND_PICTURE = "palimpsest_example.png", "palimpsest_example_2.png"
TUNING = "palimpsest_example"  # Save KV adds _00001.safetensors
SOURCE = "a red cat standing on the right in the snow"
SECOND_SOURCE = "a brown dog standing on the left in the snow"
EDIT = "a red cat sitting on the right in the snow"
OTHER_EDIT = "a red cat lying on the right in the snow"
SECOND_EDIT = "a brown dog sitting on the left in the snow"
TEMPLATE, ACTIONS = "a red cat {} on the right in the snow", "sitting\nlying\nrunning\njumping"
STEPS, GUIDANCE, SCHEDULER = 20, 3.0, "normal"
SIDE = 128  # of the example pictures

COLOURS = {"yours": "#3f789e", "learned": "#b58b2a", "edit": "#3f7a4a"}  # of the groups
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
| memory and file, per step | 41 MB | 330 MB |
| the same at rank 32 (Tune KV) | 9 MB | 38 MB |

Memory is the computer's, not the graphics card's. 30 steps of SDXL are 10 GB, at rank 32 they are 1.1 GB.

Steps, scheduler and guidance must agree between the nodes: noise found with 20 steps belongs to 20 steps."""

KNOBS = """## Not right yet?

- **Wrong pose**: raise start_percent (0.1 to 0.4), or lower source_guidance.
- **Coat, clothes or colours missing**: raise source_guidance (Apply KV) by steps of 2.
- **Colours burnt in, mud**: lower source_guidance.
- **Old surroundings come along**: source_mask (Apply KV), white over the subject in the photo."""

KNOBS_OF_TUNING = """
- **The tuned reconstruction is off**: more inner_steps; a prompt that fits the photo better.

Save KV has written the tuning to models/palimpsest_kv. The workflows *Edit again from a saved tuning* and *Many
prompts from one saved tuning* take it from there."""

START_AGAIN = """## Edit a photo again without learning it again

1. **Load Checkpoint**: the model the photo was tuned with.
2. **Load KV**: the file that Save KV wrote (models/palimpsest_kv; press R to list new ones). It brings the photo's
   noise along: neither the photo nor Invert Picture is needed.
3. **The picture as it should be**: any new action.
4. Queue: one ordinary sampling.

Keep steps, scheduler and cfg as they were when you tuned. *Edit an action in a photo* writes the file that is set
here."""

START_MANY = """## One photo, many prompts, one run

1. **Load Checkpoint**, **Load KV**: the model, and the file that Save KV wrote (models/palimpsest_kv; press R to list
   new ones).
2. **Prompt Lines**: what stays the same goes into *template*, with {} where it changes; what changes goes into
   *lines*, one prompt a line. A line that begins with # is left out.
3. Queue once: every line is sampled and saved, one after the other.

Keep steps, scheduler and cfg as they were when you tuned. *Edit an action in a photo* writes the file that is set
here.

For whole prompts, paste them into *lines* and set *template* to {} alone."""

START_TWO = """## Two subjects from two photos in one picture

1. **Load Checkpoint**: your SD 1.5 or SDXL model.
2. **Load Image**, twice: two photos of **one size**. Photos of like places and light join best.
3. **As it is**, twice: describe each photo.
4. **As it should be**, twice: the same words with another action. Each prompt rules its half.
5. Queue. The new picture is both photos wide: the noise of the two lies side by side, each Apply KV acts in its own
   half, each prompt too.

Later runs only sample, as long as you change only group 3."""

EXPECT_TWO = """## What to expect

The two subjects take their new poses, each with its own coat and colours, and the background runs through the middle
without a seam where the photos' backgrounds are alike. What both photos show, such as the tree, is there twice.

- Small things may come out in another colour, here the cat's collar, as in edits of one photo.
- **A subject reaches over the middle**: it is cut or changes there. Paint both masks by hand instead (right-click a
  Load Image, *Open in Mask Editor*), or choose photos with more room.
- The masks are scaled to the picture: they fit photos of any size, as long as both have the same.
- Learning takes twice the time and memory of one photo. Sampling works on twice the area, with one more row for each
  Apply KV whose source_guidance is not 1."""


def text(title: str, at: list[int], value: str | None, *, height: int = 110, source: str | None = None) -> dict:
    """A prompt, written here or (value None) linked from `source`."""
    node = {
        "type": "CLIPTextEncode", "title": title, "at": at, "size": [380, height], "inputs": {"clip": "checkpoint.CLIP"}
    }  # fmt: skip
    return {**node, "inputs": {**node["inputs"], "text": source}} if source else {**node, "widgets": {"text": value}}


def note(title: str, at: list[int], size: list[int], value: str) -> dict:
    return {"type": "MarkdownNote", "title": title, "at": at, "size": size, "note": value, "colour": NOTE}


def checkpoint(at: list[int]) -> dict:
    return {"type": "CheckpointLoaderSimple", "at": at, "size": [380, 110], "widgets": {"ckpt_name": CHECKPOINT}}


def load_image(at: list[int], name: str, title: str | None = None, height: int = 400) -> dict:
    node = {"type": "LoadImage", "at": at, "size": [380, height], "widgets": {"image": name}}
    return {**node, "title": title} if title else node


def encode(at: list[int], image: str) -> dict:
    return {"type": "VAEEncode", "at": at, "size": [380, 60], "inputs": {"pixels": image, "vae": "checkpoint.VAE"}}


def decode(at: list[int], latent: str) -> dict:
    return {"type": "VAEDecode", "at": at, "size": [380, 60], "inputs": {"samples": latent, "vae": "checkpoint.VAE"}}


def invert(at: list[int], latent: str = "encode.LATENT", positive: str = "source.CONDITIONING") -> dict:
    return {
        "type": "PalimpsestInvert", "at": at, "size": [380, 350],
        "widgets": {"steps": STEPS, "scheduler": SCHEDULER},
        "inputs": {"model": "checkpoint.MODEL", "latent": latent, "positive": positive,
                   "negative": "negative.CONDITIONING", "vae": "checkpoint.VAE"},
    }  # fmt: skip


def tune(at: list[int], inverted: str = "invert", positive: str = "source.CONDITIONING") -> dict:
    return {
        "type": "PalimpsestTuneKV", "at": at, "size": [380, 620],
        "widgets": {"guidance": GUIDANCE},
        "inputs": {"model": "checkpoint.MODEL", "trajectory": f"{inverted}.trajectory", "positive": positive,
                   "negative": "negative.CONDITIONING", "vae": "checkpoint.VAE"},
    }  # fmt: skip


def load_kv(at: list[int]) -> dict:
    return {"type": "PalimpsestLoadKV", "at": at, "size": [380, 180],
            "widgets": {"file": f"{TUNING}_00001.safetensors"}}  # fmt: skip


def apply(at: list[int], kv: str, model: str = "checkpoint.MODEL", **more) -> dict:
    """Apply KV; `more`: a title, and the link of its mask."""
    inputs = {"model": model, "kv": kv} | ({"mask": more.pop("mask")} if "mask" in more else {})
    return {"type": "PalimpsestApplyKV", "at": at, "size": [380, 300], "inputs": inputs, **more}


def sampler(at: list[int], model: str, positive: str, noise: str) -> dict:
    """KSampler Advanced on noise that was found, not drawn."""
    return {
        "type": "KSamplerAdvanced", "at": at, "size": [380, 350],
        "widgets": {"add_noise": "disable", "noise_seed": 0, "control_after_generate": "fixed", "steps": STEPS,
                    "cfg": GUIDANCE, "sampler_name": "euler", "scheduler": SCHEDULER, "start_at_step": 0,
                    "end_at_step": 10000, "return_with_leftover_noise": "disable"},
        "inputs": {"model": model, "positive": positive, "negative": "negative.CONDITIONING", "latent_image": noise},
    }  # fmt: skip


def save(at: list[int], title: str = "The edited picture", size: tuple[int, int] = (380, 440)) -> dict:
    return {"type": "SaveImage", "title": title, "at": at, "size": list(size),
            "widgets": {"filename_prefix": "palimpsest_edit"}, "inputs": {"images": "decode.IMAGE"}}  # fmt: skip


def group(title: str, kind: str, left: int, width: int, height: int = 1260) -> dict:
    return {"title": title, "bounding": [left, 0, width, height], "colour": COLOURS[kind]}


def edit_an_action() -> dict:
    nodes = {
        "checkpoint": checkpoint([40, 80]),
        "image": load_image([40, 250], PICTURE),
        "encode": encode([40, 720], "image.IMAGE"),
        "source": text("The picture as it is", [40, 850], SOURCE),
        "negative": text("Negative prompt", [40, 1030], ""),
        "invert": invert([500, 80]),
        "tune": tune([500, 560]),
        "keep": {"type": "PalimpsestSaveKV", "at": [940, 80], "size": [380, 110],
                 "widgets": {"filename": TUNING}, "inputs": {"kv": "tune.kv"}},
        "rebuilt": decode([940, 280], "tune.reconstruction"),
        "look": {"type": "PreviewImage", "title": "The picture, rebuilt", "at": [940, 420], "size": [380, 400],
                 "inputs": {"images": "rebuilt.IMAGE"}},
        "edit": text("The picture as it should be", [1400, 80], EDIT),
        "apply": apply([1400, 260], "tune.kv"),
        "sample": sampler([1400, 660], "apply.MODEL", "edit.CONDITIONING", "invert.noise"),
        "decode": decode([1840, 80], "sample.LATENT"),
        "save": save([1840, 210]),
        "start": note("Start here", [-480, 40], [440, 330], START_HERE),
        "settings": note("Values for real models", [-480, 430], [440, 400], SETTINGS),
        "knobs": note("Not right yet?", [1840, 730], [380, 360], KNOBS + KNOBS_OF_TUNING),
    }  # fmt: skip
    groups = [
        group("1 Your picture", "yours", 0, 460),
        group("2 Learn it", "learned", 480, 880),
        group("3 Edit it", "edit", 1380, 860),
    ]
    return {"nodes": nodes, "groups": groups}


def edit_again() -> dict:
    nodes = {
        "checkpoint": checkpoint([40, 80]),
        "load": load_kv([40, 260]),
        "negative": text("Negative prompt", [40, 510], ""),
        "edit": text("The picture as it should be", [500, 80], OTHER_EDIT),
        "apply": apply([500, 260], "load.kv"),
        "sample": sampler([940, 80], "apply.MODEL", "edit.CONDITIONING", "load.noise"),
        "decode": decode([940, 540], "sample.LATENT"),
        "save": save([1380, 80]),
        "start": note("Start here", [-480, 40], [440, 330], START_AGAIN),
        "knobs": note("Not right yet?", [1860, 40], [380, 240], KNOBS),
    }
    groups = [
        group("1 The model and what was learned", "learned", 0, 460, 700),
        group("2 Edit it", "edit", 480, 1320, 700),
    ]
    return {"nodes": nodes, "groups": groups}


def many_prompts() -> dict:
    nodes = {
        "checkpoint": checkpoint([40, 80]),
        "load": load_kv([40, 260]),
        "negative": text("Negative prompt", [40, 510], ""),
        "lines": {"type": "PalimpsestPromptLines", "at": [500, 80], "size": [380, 220],
                  "widgets": {"lines": ACTIONS, "template": TEMPLATE}},
        "edit": text("One prompt after the other", [500, 380], None, height=80, source="lines.prompts"),
        "apply": apply([500, 540], "load.kv"),
        "sample": sampler([940, 80], "apply.MODEL", "edit.CONDITIONING", "load.noise"),
        "decode": decode([940, 540], "sample.LATENT"),
        "save": save([1380, 80], "The edited pictures", (620, 640)),
        "start": note("Start here", [-480, 40], [440, 340], START_MANY),
        "knobs": note("Not right yet?", [2080, 40], [380, 240], KNOBS),
    }  # fmt: skip
    groups = [
        group("1 The model and what was learned", "learned", 0, 460, 900),
        group("2 Edit it", "edit", 480, 1560, 900),
    ]
    return {"nodes": nodes, "groups": groups}


def mask_nodes(left: int, top: int) -> dict:
    """White in the left half of a picture of two squares, and its inverse."""
    return {
        "black": {"type": "SolidMask", "title": "Black, both halves", "at": [left, top], "size": [270, 110],
                  "widgets": {"value": 0.0, "width": 2 * SIDE, "height": SIDE}},
        "white": {"type": "SolidMask", "title": "White, one half", "at": [left, top + 180], "size": [270, 110],
                  "widgets": {"value": 1.0, "width": SIDE, "height": SIDE}},
        "first half": {"type": "MaskComposite", "title": "Left half", "at": [left, top + 360], "size": [270, 130],
                       "widgets": {"x": 0, "y": 0, "operation": "add"},
                       "inputs": {"destination": "black.MASK", "source": "white.MASK"}},
        "second half": {"type": "InvertMask", "title": "Right half", "at": [left, top + 560], "size": [270, 40],
                        "inputs": {"mask": "first half.MASK"}},
    }  # fmt: skip


def half_prompt(at: list[int], title: str, prompt: str, mask: str) -> dict:
    return {"type": "ConditioningSetMask", "title": title, "at": at, "size": [380, 110],
            "widgets": {"strength": 1.0, "set_cond_area": "default"},
            "inputs": {"conditioning": prompt, "mask": mask}}  # fmt: skip


def two_subjects() -> dict:
    first, second = "first half.MASK", "second half.MASK"
    nodes = {
        "checkpoint": checkpoint([40, 80]),
        "negative": text("Negative prompt", [500, 80], ""),
        "image": load_image([40, 280], SECOND_PICTURE, "Left picture", 380),
        "encode": encode([40, 730], "image.IMAGE"),
        "source": text("Left picture as it is", [40, 850], SECOND_SOURCE),
        "image 2": load_image([500, 280], PICTURE, "Right picture", 380),
        "encode 2": encode([500, 730], "image 2.IMAGE"),
        "source 2": text("Right picture as it is", [500, 850], SOURCE),
        "invert": invert([980, 80]),
        "tune": tune([980, 560]),
        "invert 2": invert([1420, 80], "encode 2.LATENT", "source 2.CONDITIONING"),
        "tune 2": tune([1420, 560], "invert 2", "source 2.CONDITIONING"),
        "edit": text("Left half as it should be", [1900, 80], SECOND_EDIT),
        "edit 2": text("Right half as it should be", [1900, 260], OTHER_EDIT),
        **mask_nodes(1900, 440),
        "apply": apply([2340, 80], "tune.kv", mask=first, title="Apply KV, left half"),
        "apply 2": apply([2340, 480], "tune 2.kv", "apply.MODEL", mask=second, title="Apply KV, right half"),
        "half": half_prompt([2340, 880], "Left prompt", "edit.CONDITIONING", first),
        "half 2": half_prompt([2340, 1060], "Right prompt", "edit 2.CONDITIONING", second),
        "both": {"type": "ConditioningCombine", "title": "Both prompts", "at": [2780, 80], "size": [380, 60],
                 "inputs": {"conditioning_1": "half.CONDITIONING", "conditioning_2": "half 2.CONDITIONING"}},
        "side by side": {"type": "LatentConcat", "title": "Noise, side by side", "at": [2780, 210], "size": [380, 90],
                         "widgets": {"dim": "x"}, "inputs": {"samples1": "invert.noise", "samples2": "invert 2.noise"}},
        "sample": sampler([2780, 370], "apply 2.MODEL", "both.CONDITIONING", "side by side.LATENT"),
        "decode": decode([2780, 800], "sample.LATENT"),
        "save": save([3220, 80], "Both in one picture", (620, 440)),
        "start": note("Start here", [-480, 40], [440, 360], START_TWO),
        "settings": note("Values for real models", [-480, 470], [440, 370], SETTINGS),
        "expect": note("What to expect", [3220, 600], [620, 340], EXPECT_TWO),
    }  # fmt: skip
    groups = [
        group("1 Your pictures", "yours", 0, 920),
        group("2 Learn them", "learned", 940, 900),
        group("3 Edit them into one picture", "edit", 1860, 2020),
    ]
    return {"nodes": nodes, "groups": groups}


GRAPHS = {
    "Edit an action in a photo (KV Inversion)": edit_an_action,
    "Edit again from a saved tuning (KV Inversion)": edit_again,
    "Many prompts from one saved tuning (KV Inversion)": many_prompts,
    "Two subjects in one picture (KV Inversion)": two_subjects,
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
