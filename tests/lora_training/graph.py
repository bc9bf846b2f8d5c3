"""The workflow of Train LoRA: pictures in, a LoRA and what it draws out."""

from __future__ import annotations

from graphs.parts import (
    CAT,
    COFFEE,
    GUIDANCE,
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

TITLE = "15 Teach a style with your pictures (LoRA)"
TAUGHT = "a tabby cat looking ahead\na red cup of coffee on a wooden table"
ASKED = "a lighthouse by the sea"
SIDE = 512

START = """## Teach a style with your pictures

1. **Load Checkpoint**: your SD 1.5 or SDXL model.
2. Your pictures: 10 to 40. Put **Load Image-Text Dataset from Folder** in the place of the two *Load Image* and
   *Image Batch*, and link its texts to *captions*.
3. **captions**: what each picture shows, a line each. Leave the style out: what no word claims is what is learned.
4. Queue. The sheet shows the same prompt after every second epoch: take the file of the one you like best.

The LoRA lies in models/loras, for **Load LoRA** and other programs. With 20 pictures these values are 2,000 steps."""

HELP = """## Not right yet?

- **Hardly any style**: more *epochs*; *rank* 32; *learning_rate* 0.0002.
- **Every picture looks like one of yours**: an earlier file; fewer epochs; *rank* 8.
- **Burnt colours**: half the learning rate.
- **A subject instead of a style**: *trigger* a rare word, its kind in every caption, *masks* of it.
- **Out of memory**: *checkpointing* on, *batch_size* 1, *text_rate* 0.

The model that comes out is an ordinary one: put Apply KV or Cross-Attention Mask behind it."""


def train() -> dict:
    return {
        "type": "PalimpsestTrainLoRA", "size": [WIDE, 820],
        "widgets": {"captions": TAUGHT, "preview_prompts": ASKED, "filename": "my_style"},
        "inputs": {"model": "checkpoint.MODEL", "clip": "checkpoint.CLIP", "vae": "checkpoint.VAE",
                   "images": "batch.IMAGE"},
    }  # fmt: skip


def sample() -> dict:
    return {
        "type": "KSampler", "size": [WIDE, 280],
        "widgets": {"seed": 0, "control_after_generate": "fixed", "steps": STEPS, "cfg": GUIDANCE,
                    "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0},
        "inputs": {"model": "train.model", "positive": "asked.CONDITIONING", "negative": "negative.CONDITIONING",
                   "latent_image": "empty.LATENT"},
    }  # fmt: skip


def teach() -> dict:
    asked = {**text("A picture in your style", ASKED), "inputs": {"clip": "train.clip"}}
    batch = {"type": "ImageBatch", "size": [WIDE, 60], "inputs": {"image1": "image.IMAGE", "image2": "second.IMAGE"}}
    empty = {
        "type": "EmptyLatentImage",
        "size": [WIDE, 120],
        "widgets": {"width": SIDE, "height": SIDE, "batch_size": 1},
    }
    drawn = {"asked": asked, "negative": negative(), "empty": empty, "sample": sample()}
    return graph(
        {"start": note("Start here", START, 520), "help": note("Not right yet?", HELP, 460)},
        group(
            "1  Your pictures",
            "yours",
            {"checkpoint": checkpoint(), "image": load_image(CAT, "Your first picture")},
            {"second": load_image(COFFEE, "Your second picture"), "batch": batch},
        ),
        group("2  Learn them", "learned", {"train": train()}, {
            "sheet": preview("What it draws, epoch by epoch", "train.sheet"),
            "plot": preview("The training loss", "train.plot"),
        }),
        group("3  A new picture", "edit", drawn, {
            "decode": decode(), "save": save("A picture in your style"),
        }),
    )  # fmt: skip


GRAPHS = {TITLE: teach}
