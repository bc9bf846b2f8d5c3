"""The workflows of KV Inversion."""

from __future__ import annotations

from graphs.parts import (
    ACTIONS,
    EDIT,
    GUIDANCE,
    OTHER_EDIT,
    PICTURE,
    SECOND_EDIT,
    SECOND_PICTURE,
    SECOND_SOURCE,
    SIDE,
    SOURCE,
    TEMPLATE,
    TUNING,
    checkpoint,
    decode,
    encode,
    group,
    invert,
    load_image,
    note,
    sampler,
    save,
    text,
)
from pocket.settings import POCKET

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


def tune(at: list[int], inverted: str = "invert", positive: str = "source.CONDITIONING") -> dict:
    return {
        "type": "PalimpsestTuneKV", "at": at, "size": [380, 620],
        "widgets": POCKET["PalimpsestTuneKV"] | {"guidance": GUIDANCE},
        "inputs": {"model": "checkpoint.MODEL", "trajectory": f"{inverted}.trajectory", "positive": positive,
                   "negative": "negative.CONDITIONING", "vae": "checkpoint.VAE"},
    }  # fmt: skip


def load_kv(at: list[int]) -> dict:
    return {"type": "PalimpsestLoadKV", "at": at, "size": [380, 180],
            "widgets": {"file": f"{TUNING}_00001.safetensors"}}  # fmt: skip


def apply(at: list[int], kv: str, model: str = "checkpoint.MODEL", **more) -> dict:
    """Apply KV; `more`: a title, and the link of its mask."""
    inputs = {"model": model, "kv": kv} | ({"mask": more.pop("mask")} if "mask" in more else {})
    return {"type": "PalimpsestApplyKV", "at": at, "size": [380, 300],
            "widgets": dict(POCKET["PalimpsestApplyKV"]), "inputs": inputs, **more}  # fmt: skip


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
