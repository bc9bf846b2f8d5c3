"""The workflow of Train Instruction: pictures, what they should become, and how one would ask for it."""

from __future__ import annotations

from graphs.parts import (
    CAT,
    COFFEE,
    GUIDANCE,
    SCHEDULER,
    STEPS,
    WIDE,
    checkpoint,
    decode,
    graph,
    group,
    load_image,
    negative,
    note,
    preview,
    save,
    text,
)

TITLE = "Your own instruction model (Train Instruction)"
LEARNED = "turn it into a poster of six colours"
COLOURS = 6
PICTURE_GUIDANCE = 1.5  # of InstructPix2Pix, beside 7.5 for the text (arXiv:2211.09800)

START = """## Teach a model your own edit

1. **Load Checkpoint**: your SD 1.5 or SDXL model; it gets channels for the picture, blank ones.
2. **Pictures** as they are, and the **results** they should become, in the same order: some dozens. Here *Quantize
   Image* makes the results, so that the workflow runs as it is; put your own pairs in its place.
3. **instructions**: how you will ask for it, a line for each pair, or one line for all.
4. Queue. The sheet shows the picture, what the model makes of it by step, and the result.

**Thousands of pairs?** A folder in *input/palimpsest_datasets* with *triples.jsonl*, a line each:
`{"picture": "a.png", "instruction": "make it blue", "result": "b.png"}`. Choose it in *folder*."""

HELP = """## Not right yet?

- **The picture stays as it is**: more *steps*; *text_guidance* 10; *picture_guidance* 1.2.
- **The edit comes, but the picture is another**: *picture_guidance* 2; more pairs.
- **Only your pictures can be edited**: more and different pairs; *rank* 16; an earlier file.
- **Out of memory**: *checkpointing* on, *batch_size* 1, *resolution* 256.

**Later**: Load Diffusion Model with the file that ends in *_base*, Load LoRA with the other, then the box on the right.
*Save Checkpoint* makes one file of both."""


def train() -> dict:
    return {
        "type": "PalimpsestTrainInstruction", "size": [WIDE, 820],
        "widgets": {"instructions": LEARNED, "filename": "my_edits"},
        "inputs": {"model": "checkpoint.MODEL", "clip": "checkpoint.CLIP", "vae": "checkpoint.VAE",
                   "pictures": "batch.IMAGE", "results": "results.IMAGE"},
    }  # fmt: skip


def pairs() -> dict[str, dict]:
    return {
        "second": load_image(COFFEE, "Your second picture"),
        "batch": {"type": "ImageBatch", "title": "The pictures as they are", "size": [WIDE, 60],
                  "inputs": {"image1": "image.IMAGE", "image2": "second.IMAGE"}},
        "results": {"type": "ImageQuantize", "title": "What they should become", "size": [WIDE, 90],
                    "widgets": {"colors": COLOURS, "dither": "none"}, "inputs": {"image": "batch.IMAGE"}},
    }  # fmt: skip


def edit() -> dict[str, dict]:
    """The host's InstructPix2Pix: the picture on both prompts, and the guidance of each."""
    return {
        "shown": {"type": "InstructPixToPixConditioning", "title": "With the picture", "size": [WIDE, 120],
                  "inputs": {"positive": "asked.CONDITIONING", "negative": "negative.CONDITIONING",
                             "vae": "checkpoint.VAE", "pixels": "image.IMAGE"}},
        "guider": {"type": "DualCFGGuider", "size": [WIDE, 200],
                   "widgets": {"cfg_conds": GUIDANCE, "cfg_cond2_negative": PICTURE_GUIDANCE, "style": "regular"},
                   "inputs": {"model": "train.model", "cond1": "shown.positive", "cond2": "shown.negative",
                              "negative": "negative.CONDITIONING"}},
        "noise": {"type": "RandomNoise", "size": [WIDE, 90],
                  "widgets": {"noise_seed": 0, "control_after_generate": "fixed"}},
        "euler": {"type": "KSamplerSelect", "size": [WIDE, 60], "widgets": {"sampler_name": "euler"}},
        "sigmas": {"type": "BasicScheduler", "size": [WIDE, 110],
                   "widgets": {"scheduler": SCHEDULER, "steps": STEPS, "denoise": 1.0},
                   "inputs": {"model": "train.model"}},
        "sample": {"type": "SamplerCustomAdvanced", "size": [WIDE, 130],
                   "inputs": {"noise": "noise.NOISE", "guider": "guider.GUIDER", "sampler": "euler.SAMPLER",
                              "sigmas": "sigmas.SIGMAS", "latent_image": "shown.latent"}},
    }  # fmt: skip


def teach() -> dict:
    return graph(
        {"start": note("Start here", START, 560), "help": note("Not right yet?", HELP, 420)},
        group(
            "1  Your pictures",
            "yours",
            {"checkpoint": checkpoint(), "image": load_image(CAT, "Your first picture")},
            pairs(),
        ),
        group("2  Learn the edit", "learned", {"train": train()}, {
            "sheet": preview("Picture, step by step, result", "train.sheet"),
            "plot": preview("The training loss", "train.plot"),
        }),
        group("3  Ask for it", "edit", {"asked": text("What to do", LEARNED), "negative": negative(), **edit()}, {
            "decode": decode("sample.output"), "save": save(),
        }),
    )  # fmt: skip


GRAPHS = {TITLE: teach}
