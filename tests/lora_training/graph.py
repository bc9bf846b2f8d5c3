"""The workflow of Train LoRA: pictures in, a LoRA and what it draws out."""

from __future__ import annotations

from graphs.parts import (
    AWAKE,
    CAT,
    COFFEE,
    GUIDANCE,
    MASKED_CAT,
    STEPS,
    WIDE,
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
    words,
)
from kv.graph import apply, tune

TITLE = "Teach a style with your pictures (LoRA)"
TAUGHT = "a tabby cat looking ahead\na red cup of coffee on a wooden table"
ASKED = "a lighthouse by the sea"
STYLED, STYLE = "a close-up photo of a tabby cat sleeping, eyes closed, in ink wash", "ink wash"
SIDE = 512

START = """## Teach a style with your pictures

1. **Load Checkpoint**: your SD 1.5 or SDXL model.
2. Your pictures: 10 to 40. Put **Load Image-Text (from Folder)** in the place of the two *Load Image* and
   *Image Batch*, and link its texts to *captions* of the helper.
3. **Caption Helper**: what each picture shows, a line each; or choose the *folder* whose pictures have .txt or .caption
   files beside them. It leaves words of style out: what no word claims is what is learned.
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
        "widgets": {"preview_prompts": ASKED, "filename": "my_style"},
        "inputs": {"model": "checkpoint.MODEL", "clip": "checkpoint.CLIP", "vae": "checkpoint.VAE",
                   "images": "batch.IMAGE", "captions": "helper.captions"},
    }  # fmt: skip


def helper() -> dict:
    return {"type": "PalimpsestCaptionHelper", "size": [WIDE, 300], "widgets": {"captions": TAUGHT},
            "inputs": {"images": "batch.IMAGE"}}  # fmt: skip


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
            {"second": load_image(COFFEE, "Your second picture"), "batch": batch, "helper": helper()},
        ),
        group("2  Learn them", "learned", {"train": train()}, {
            "captions": preview("The captions, to be read over", "helper.sheet", 260),
            "sheet": preview("What it draws, epoch by epoch", "train.sheet"),
            "plot": preview("The training loss", "train.plot"),
        }),
        group("3  A new picture", "edit", drawn, {
            "decode": decode(), "save": save("A picture in your style"),
        }),
    )  # fmt: skip


BESIDE = "A style beside KV Inversion and a mask (LoRA)"

START_BESIDE = """## Your style on a photo, the subject kept

1. **Load Checkpoint**, **Load LoRA**: your model, and a style such as the template *Teach a style* writes it.
2. **Load Image**: your photo; paint a mask over what the words of the style should change (right-click, *Open in Mask
   Editor*).
3. **The picture as it is**: describe the photo. It is inverted and recorded by the checkpoint alone, so that it comes
   back as it was.
4. **Select Words**: the new action and the style; write the style's words, or its trigger, into *words*.
5. Queue.

The model with the LoRA goes through **Cross-Attention Mask**, which holds the style's words in your mask, and through
**Apply KV**, which brings the subject back. The file is an ordinary LoRA: it works before any node of the pack."""

HELP_BESIDE = """## Not right yet?

- **Too little style**: *strength_model* of Load LoRA up; *source_guidance* of Apply KV down to 1, *end_percent* 0.7.
- **Too much**: *strength_model* 0.4 to 0.8.
- **The style shows outside of the mask**: what a LoRA does to the whole model no mask of words holds; put **Keep
  Outside** behind the decoder.
- **The style was taught without words**: leave Cross-Attention Mask out."""


def beside() -> dict:
    lora = {"type": "LoraLoader", "title": "Your style", "size": [WIDE, 130], "unset": ["lora_name"],
            "widgets": {"strength_model": 0.8, "strength_clip": 0.8},
            "inputs": {"model": "checkpoint.MODEL", "clip": "checkpoint.CLIP"}}  # fmt: skip
    held = {"type": "PalimpsestCrossAttentionMask", "size": [WIDE, 300],
            "inputs": {"model": "lora.MODEL", "tokens": "edit.tokens", "mask": "image.MASK"}}  # fmt: skip
    edit = words(STYLED, STYLE, "The picture as it should be")
    edit["inputs"] = {"clip": "lora.CLIP"}
    return graph(
        {"start": note("Start here", START_BESIDE, 480), "help": note("Not right yet?", HELP_BESIDE, 280)},
        group("1 Your photo, your style", "yours", {
            "checkpoint": checkpoint(), "lora": lora, "image": load_image(MASKED_CAT, "Your photo, with a mask"),
            "encode": encode(),
        }, {"source": text("The picture as it is", AWAKE), "negative": negative()}),
        group("2 Record it, without the style", "learned", {"invert": invert(), "tune": tune()}),
        group("3 Edit it, in your style", "edit", {
            "edit": edit, "mask": held, "apply": apply("tune.kv", "mask.MODEL"),
        }, {
            "sample": sampler("apply.MODEL", "edit.positive"), "decode": decode(),
        }, {"save": save(), "compare": compare()}),
    )  # fmt: skip


GRAPHS = {TITLE: teach, BESIDE: beside}
