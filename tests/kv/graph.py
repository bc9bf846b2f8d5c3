"""The workflows of KV Inversion."""

from __future__ import annotations

from graphs.parts import (
    ACTIONS,
    ANY_ACTION,
    ASLEEP,
    AWAKE,
    CAT,
    COFFEE,
    CUP,
    GUIDANCE,
    HEIGHT,
    TUNING,
    WIDTH,
    YAWNING,
    checkpoint,
    compare,
    decode,
    encode,
    graph,
    group,
    invert,
    load_image,
    negative,
    note,
    preview,
    sampler,
    save,
    text,
)
from kv import flow_graph

FULL_CUP = "a photo of a red cup full of hot chocolate on a wooden table"

START_HERE = """## Change what someone does, keep who it is

1. **Load Checkpoint**: your SD 1.5 or SDXL model.
2. **Load Image**: your photo, scaled to the model's size (about 512 px for SD 1.5, 1024 px for SDXL).
3. **The picture as it is**: describe the photo.
4. **The picture as it should be**: the same words with another action.
5. Queue. The first run inverts and records the photo, a model call a step each. As long as you change only group 3,
   later runs only sample."""

SETTINGS = """## Values for SD 1.5 and SDXL

| | SD 1.5, 512 px | SDXL, 1024 px |
|---|---|---|
| steps (Invert Picture **and** KSampler) | 30 to 50 | 30 |
| guidance (Tune KV) **=** cfg (KSampler) | 4 to 7.5 | 4 to 7 |
| source_guidance (Apply KV): begin at | 3 | 3 |
| memory and file, per step | 14 MB | 110 MB |

Memory is the computer's, not the graphics card's: 30 steps of SDXL are 3.3 GB.

Steps, scheduler and guidance must agree between the nodes: noise found with 20 steps belongs to 20 steps."""

KNOBS = """## Not right yet?

- **Wrong pose**: raise start_percent (0.1 to 0.4), or lower source_guidance.
- **Coat, clothes or colours missing**: raise source_guidance (Apply KV) by steps of 2.
- **Colours burnt in, mud**: lower source_guidance.
- **Old surroundings come along**: source_mask (Apply KV), white over the subject in the photo."""

KNOBS_OF_TUNING = """
- **The picture, redrawn, is off**: a prompt that fits the photo better; more steps.
- **Closer texture at small changes**: inner_steps 10 (Tune KV) learns the photo, which takes far longer; then mode
  *frozen* or *recompute* with source_guidance 1 (Apply KV).

Save KV has written the recording to models/palimpsest_kv. The templates *Edit again from a file* and *Many
prompts from one file* take it from there."""

START_AGAIN = """## Edit a photo again without recording it again

**No file yet?** Run the template *Change what a subject does* once: it writes it. Then press R here.

1. **Load Checkpoint**: the model the photo was recorded with.
2. **Load KV**: the file that Save KV wrote (models/palimpsest_kv). It brings the photo's noise along: Invert Picture is
   not needed, and the photo only to compare with.
3. **The picture as it should be**: any new action.
4. Queue: one ordinary sampling.

Keep steps, scheduler and cfg as they were when the photo was recorded."""

START_MANY = """## One photo, many prompts, one run

**No file yet?** Run the template *Change what a subject does* once: it writes it. Then press R here.

1. **Load Checkpoint**, **Load KV**: the model, and the file that Save KV wrote (models/palimpsest_kv).
2. **Prompt Lines**: what stays the same goes into *template*, with {} where it changes; what changes goes into
   *lines*, one prompt a line. A line that begins with # is left out.
3. Queue once: every line is sampled and saved, one after the other.

Keep steps, scheduler and cfg as they were when the photo was recorded.

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

The two subjects take their new poses, each with its own coat and colours. Where the photos' backgrounds are alike, they
run through the middle without a seam; here they are not, so the seam shows.

- Small things may come out in another colour, as in edits of one photo.
- **A subject reaches over the middle**: it is cut or changes there. Paint both masks by hand instead (right-click a
  Load Image, *Open in Mask Editor*), or choose photos with more room.
- The masks are scaled to the picture: they fit photos of any size, as long as both have the same.
- Recording takes twice the time and memory of one photo. Sampling works on twice the area, with one more row for each
  Apply KV whose source_guidance is not 1."""


def tune(inverted: str = "invert", positive: str = "source.CONDITIONING") -> dict:
    """Tune KV that learns nothing: mode extend shows what is recorded."""
    return {
        "type": "PalimpsestTuneKV", "size": [380, 520],
        "widgets": {"guidance": GUIDANCE, "inner_steps": 0},
        "inputs": {"model": "checkpoint.MODEL", "trajectory": f"{inverted}.trajectory", "positive": positive,
                   "negative": "negative.CONDITIONING", "vae": "checkpoint.VAE"},
    }  # fmt: skip


def load_kv() -> dict:
    return {"type": "PalimpsestLoadKV", "size": [380, 100], "unset": ["file"]}


def apply(kv: str, model: str = "checkpoint.MODEL", **more) -> dict:
    """Apply KV; `more`: a title, and the link of its mask."""
    inputs = {"model": model, "kv": kv} | ({"mask": more.pop("mask")} if "mask" in more else {})
    widgets = {"source_guidance": 3.0}
    return {"type": "PalimpsestApplyKV", "size": [380, 290], "widgets": widgets, "inputs": inputs, **more}


def edit_an_action() -> dict:
    return graph(
        {
            "start": note("Start here", START_HERE, 300),
            "settings": note("Values for SD 1.5 and SDXL", SETTINGS, 470),
            "knobs": note("Not right yet?", KNOBS + KNOBS_OF_TUNING, 350),
        },
        group(
            "1 Your picture",
            "yours",
            {
                "checkpoint": checkpoint(),
                "image": load_image(CAT),
                "encode": encode(),
                "source": text("The picture as it is", AWAKE),
                "negative": negative(),
            },
        ),
        group(
            "2 Record it",
            "learned",
            {"invert": invert(), "tune": tune()},
            {
                "rebuilt": decode("invert.reconstruction"),
                "look": preview("The picture, redrawn", "rebuilt.IMAGE"),
                "keep": {"type": "PalimpsestSaveKV", "size": [380, 60],
                         "widgets": {"filename": TUNING}, "inputs": {"kv": "tune.kv"}},
            },
        ),
        group(
            "3 Edit it",
            "edit",
            {
                "edit": text("The picture as it should be", ASLEEP),
                "apply": apply("tune.kv"),
                "sample": sampler("apply.MODEL", "edit.CONDITIONING"),
            },
            {"decode": decode(), "save": save(), "compare": compare()},
        ),
    )  # fmt: skip


def from_a_file() -> dict:
    """The first group of graphs that load what was recorded."""
    return group(
        "1 The model, and what was learned",
        "learned",
        {
            "checkpoint": checkpoint(),
            "load": load_kv(),
            "negative": negative(),
            "image": load_image(CAT, "The photo, to compare with"),
        },
    )


def edit_again() -> dict:
    return graph(
        {"start": note("Start here", START_AGAIN, 320), "knobs": note("Not right yet?", KNOBS, 210)},
        from_a_file(),
        group(
            "2 Edit it",
            "edit",
            {"edit": text("The picture as it should be", YAWNING), "apply": apply("load.kv")},
            {"sample": sampler("apply.MODEL", "edit.CONDITIONING", "load.noise"), "decode": decode()},
            {"save": save(), "compare": compare()},
        ),
    )


def many_prompts() -> dict:
    return graph(
        {"start": note("Start here", START_MANY, 360), "knobs": note("Not right yet?", KNOBS, 210)},
        from_a_file(),
        group(
            "2 Edit it",
            "edit",
            {
                "lines": {"type": "PalimpsestPromptLines", "size": [380, 200],
                          "widgets": {"lines": ACTIONS, "template": ANY_ACTION}},
                "edit": text("One prompt after the other", None, source="lines.prompts"),
                "apply": apply("load.kv"),
            },
            {"sample": sampler("apply.MODEL", "edit.CONDITIONING", "load.noise"), "decode": decode()},
            {"save": save("The edited pictures"), "compare": compare()},
        ),
    )  # fmt: skip


def halves() -> dict[str, dict]:
    """White in the left half of a picture of two photos, and its inverse."""
    return {
        "black": {"type": "SolidMask", "title": "Black, both halves", "size": [380, 110],
                  "widgets": {"value": 0.0, "width": 2 * WIDTH, "height": HEIGHT}},
        "white": {"type": "SolidMask", "title": "White, one half", "size": [380, 110],
                  "widgets": {"value": 1.0, "width": WIDTH, "height": HEIGHT}},
        "first half": {"type": "MaskComposite", "title": "Left half", "size": [380, 130],
                       "widgets": {"x": 0, "y": 0, "operation": "add"},
                       "inputs": {"destination": "black.MASK", "source": "white.MASK"}},
        "second half": {"type": "InvertMask", "title": "Right half", "size": [380, 40],
                        "inputs": {"mask": "first half.MASK"}},
    }  # fmt: skip


def half_prompt(title: str, prompt: str, mask: str) -> dict:
    return {"type": "ConditioningSetMask", "title": title, "size": [380, 110],
            "widgets": {"strength": 1.0, "set_cond_area": "default"},
            "inputs": {"conditioning": prompt, "mask": mask}}  # fmt: skip


def two_subjects() -> dict:
    first, second = "first half.MASK", "second half.MASK"
    return graph(
        {
            "start": note("Start here", START_TWO, 340),
            "expect": note("What to expect", EXPECT_TWO, 380),
            "settings": note("Values for SD 1.5 and SDXL", SETTINGS, 470),
        },
        group(
            "1 Your pictures",
            "yours",
            {
                "checkpoint": checkpoint(),
                "image": load_image(CAT, "Left picture"),
                "encode": encode(),
                "source": text("Left picture as it is", AWAKE),
            },
            {
                "negative": negative(),
                "image 2": load_image(COFFEE, "Right picture"),
                "encode 2": encode("image 2.IMAGE"),
                "source 2": text("Right picture as it is", CUP),
            },
        ),
        group(
            "2 Record them",
            "learned",
            {"invert": invert(), "tune": tune()},
            {
                "invert 2": invert("encode 2.LATENT", "source 2.CONDITIONING"),
                "tune 2": tune("invert 2", "source 2.CONDITIONING"),
            },
        ),
        group(
            "3 Edit them into one picture",
            "edit",
            {
                "edit": text("Left half as it should be", ASLEEP),
                "edit 2": text("Right half as it should be", FULL_CUP),
                **halves(),
            },
            {
                "apply": apply("tune.kv", mask=first, title="Apply KV, left half"),
                "apply 2": apply("tune 2.kv", "apply.MODEL", mask=second, title="Apply KV, right half"),
                "half": half_prompt("Left prompt", "edit.CONDITIONING", first),
                "half 2": half_prompt("Right prompt", "edit 2.CONDITIONING", second),
            },
            {
                "both": {"type": "ConditioningCombine", "title": "Both prompts", "size": [380, 60],
                         "inputs": {"conditioning_1": "half.CONDITIONING", "conditioning_2": "half 2.CONDITIONING"}},
                "side by side": {"type": "LatentConcat", "title": "Noise, side by side", "size": [380, 90],
                                 "widgets": {"dim": "x"},
                                 "inputs": {"samples1": "invert.noise", "samples2": "invert 2.noise"}},
                "sample": sampler("apply 2.MODEL", "both.CONDITIONING", "side by side.LATENT"),
                "decode": decode(),
            },
            {
                "save": save("Both in one picture", height=300),
                "photos": {"type": "ImageStitch", "title": "The photos, side by side", "size": [380, 180],
                           "widgets": {"direction": "right", "match_image_size": False, "spacing_width": 0},
                           "inputs": {"image1": "image.IMAGE", "image2": "image 2.IMAGE"}},
                "compare": compare("photos.IMAGE"),
            },
        ),
    )  # fmt: skip


GRAPHS = {
    "Change what a subject does (KV Inversion)": edit_an_action,
    "Edit again from a file (KV Inversion)": edit_again,
    "Many prompts from one file (KV Inversion)": many_prompts,
    "Two photos in one picture (KV Inversion)": two_subjects,
    **flow_graph.GRAPHS,
}
