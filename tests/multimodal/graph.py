"""The workflows of multimodal prompts: pictures in the place of words, and the training that makes them understood."""

from __future__ import annotations

from graphs.parts import (
    AWAKE,
    GUIDANCE,
    MASKED_CAT,
    MASKED_COFFEE,
    SCHEDULER,
    STEPS,
    checkpoint,
    compare,
    decode,
    encode,
    graph,
    group,
    invert,
    load_image,
    note,
    preview,
    sampler,
    save,
)
from kv.graph import tune

SENTENCE = "a <image1> cup on a table beside a <image2> cat"
STYLE = "a <image1> teapot on a kitchen table"
SUBJECT = "a close-up photo of a <image1> cat looking ahead, eyes open"
REPOSED = "a close-up photo of a <image1> cat sleeping, eyes closed"
SIDE = 512

NO_WEIGHTS = """**It needs weights that nobody has published for SD 1.5 or SDXL**: without a connector of your own,
which *19 Train a connector* makes, this can be read, not run.

"""

START_SENTENCE = (
    NO_WEIGHTS
    + """## Two pictures in a sentence

1. **Load Multimodal Encoder**: a vision-language model (a folder in models/palimpsest_encoders) and the connector that
   was trained on it. **Load LoRA (Model)**: the LoRA that was trained beside it.
2. **Load Image**: two pictures, each with a painted mask on what is meant.
3. **Multimodal Prompt**: write `<image1>`, `<image2>` where the pictures belong. `<image1:0.7>` weakens one.
4. Queue."""
)

START_STYLE = (
    NO_WEIGHTS
    + """## Looks from a picture

1. **Load Multimodal Encoder**, **Load LoRA (Model)**, **Load Checkpoint**: what belongs together.
2. **Load Image**: the picture whose looks you want, masked.
3. **Multimodal Prompt**: `<image1>` before another noun. The words say what is drawn, the picture how it looks.
4. Queue. *tokens_per_picture* fewer: looser; more: closer to the picture."""
)

START_BOTH = (
    NO_WEIGHTS
    + """## Multimodal prompt and KV Inversion

1. **Load Multimodal Encoder**, **Load LoRA (Model)**, **Load Checkpoint**, **Load Image** with a mask on the subject.
2. **The picture as it is**: the photo in words, its subject as `<image1>`.
3. **The picture as it should be**: the same with another action.
4. Queue.

**Tune KV** learns the photo's keys and values under a prompt that shows the subject itself: what words leave out is in
the picture of it, and both hold its looks while the pose changes."""
)

START_TRAIN = """**It needs a vision-language model in models/palimpsest_encoders, hundreds of pictures, and days**:
nobody has published such a connector for SD 1.5 or SDXL.

## Train a connector on your own pictures

1. **Load Multimodal Encoder**: the vision-language model, connector *none*.
2. **Load Image-Text Dataset from Folder** in place of the example: some hundred captioned pictures.
3. **Build Multimodal Dataset**: choose a *detector* (a GroundingDINO folder in models/palimpsest_detectors), or connect
   masks as here. Look at the contact sheet: do the words fit the crops?
4. **Train Multimodal Encoder** writes the connector and the U-Net's LoRA as files. *preset* *in lessons* teaches the
   text encoder's words first, then drawing; *paper* is MUMU's training.

The paper trained 300,000 steps on five million pictures."""


def lora() -> dict:
    return {"type": "LoraLoaderModelOnly", "title": "The LoRA trained beside the connector", "size": [380, 90],
            "widgets": {"lora_name": ""}, "inputs": {"model": "checkpoint.MODEL"}}  # fmt: skip


def encoder() -> dict:
    return {"type": "PalimpsestLoadMultimodalEncoder", "size": [380, 180], "unset": ["folder"],
            "widgets": {"connector": "none"}}  # fmt: skip


def prompt(text: str, title: str = "Multimodal Prompt", **inputs: str) -> dict:
    given = {"model": "lora.MODEL", "multimodal_encoder": "encoder.multimodal_encoder"}
    given |= {"images.image1": "image.IMAGE", "masks.mask1": "image.MASK"} | inputs
    return {"type": "PalimpsestMultimodalPrompt", "title": title, "size": [380, 390],
            "widgets": {"text": text}, "inputs": given}  # fmt: skip


def seen() -> dict:
    return preview("What the encoder sees", "prompt.seen")


def new_picture(source: str = "prompt") -> dict:
    return {
        "type": "KSampler", "size": [380, 290],
        "widgets": {"seed": 1, "control_after_generate": "fixed", "steps": STEPS, "cfg": GUIDANCE,
                    "sampler_name": "ddim", "scheduler": SCHEDULER, "denoise": 1.0},
        "inputs": {"model": f"{source}.model", "positive": f"{source}.positive", "negative": f"{source}.negative",
                   "latent_image": "empty.LATENT"},
    }  # fmt: skip


def empty() -> dict:
    return {"type": "EmptyLatentImage", "size": [380, 130],
            "widgets": {"width": SIDE, "height": SIDE, "batch_size": 4}}  # fmt: skip


def models() -> dict[str, dict]:
    return {"checkpoint": checkpoint(), "lora": lora(), "encoder": encoder()}


def sentence() -> dict:
    both = {"images.image2": "other.IMAGE", "masks.mask2": "other.MASK"}
    return graph(
        {"start": note("Start here", START_SENTENCE, 380)},
        group("1 Models that belong together", "yours", models() | {"empty": empty()}),
        group(
            "2 Your pictures",
            "yours",
            {
                "image": load_image(MASKED_COFFEE, "image1, its subject masked"),
                "other": load_image(MASKED_CAT, "image2, its subject masked"),
            },
        ),
        group(
            "3 The sentence",
            "edit",
            {"prompt": prompt(SENTENCE, **both), "seen": seen(), "sample": new_picture()},
            {"decode": decode(), "save": save("The pictures", height=440)},
        ),
    )


def style() -> dict:
    return graph(
        {"start": note("Start here", START_STYLE, 320)},
        group("1 Models that belong together", "yours", models() | {"empty": empty()}),
        group("2 The looks", "yours", {"image": load_image(MASKED_COFFEE, "The looks, masked")}),
        group(
            "3 Drawn with them",
            "edit",
            {"prompt": prompt(STYLE), "seen": seen(), "sample": new_picture()},
            {"decode": decode(), "save": save("The pictures", height=440)},
        ),
    )


def with_kv() -> dict:
    inverted, tuned = invert(positive="source.positive"), tune(positive="source.positive")
    sampled = sampler("apply.MODEL", "edit.positive")
    source = {"model": "source.model", "negative": "source.negative"}
    return graph(
        {"start": note("Start here", START_BOTH, 380)},
        group(
            "1 Models, and your photo",
            "yours",
            models(),
            {"image": load_image(MASKED_CAT, "Your photo, its subject masked"), "encode": encode()},
        ),
        group(
            "2 Learn the photo under its own picture",
            "learned",
            {
                "source": prompt(SUBJECT, "The picture as it is"),
                "invert": {**inverted, "inputs": inverted["inputs"] | source},
            },
            {"tune": {**tuned, "inputs": tuned["inputs"] | source}},
        ),
        group(
            "3 Edit",
            "edit",
            {
                "edit": prompt(REPOSED, "The picture as it should be"),
                "apply": {"type": "PalimpsestApplyKV", "size": [380, 290], "widgets": {"source_guidance": 3.0},
                          "inputs": {"model": "edit.model", "kv": "tune.kv"}},
            },
            {
                "sample": {**sampled, "inputs": sampled["inputs"] | {"negative": "edit.negative"}},
                "decode": decode(),
            },
            {"save": save(), "compare": compare()},
        ),
    )  # fmt: skip


def train() -> dict:
    return graph(
        {"start": note("Start here", START_TRAIN, 380)},
        group(
            "1 Your pictures and their captions",
            "yours",
            {
                "checkpoint": checkpoint(),
                "encoder": encoder(),
                "image": load_image(MASKED_CAT, "Your pictures, with masks"),
                "captions": {"type": "PrimitiveStringMultiline", "title": "Their captions", "size": [380, 110],
                             "widgets": {"value": AWAKE}},
            },
        ),
        group(
            "2 Crops bound to words",
            "learned",
            {
                "build": {"type": "PalimpsestBuildMultimodalDataset", "size": [380, 480],
                          "widgets": {"words": "cat", "name": "palimpsest_example"},
                          "inputs": {"images": "image.IMAGE", "captions": "captions.STRING", "masks": "image.MASK"}},
                "sheet": preview("The contact sheet", "build.contact_sheet"),
            },
        ),
        group(
            "3 Train",
            "edit",
            {
                "train": {"type": "PalimpsestTrainMultimodal", "size": [380, 640],
                          "widgets": {"control_after_generate": "fixed", "name": "palimpsest_example",
                                      "preset": "in lessons"},
                          "inputs": {"model": "checkpoint.MODEL", "vae": "checkpoint.VAE",
                                     "multimodal_encoder": "encoder.multimodal_encoder", "dataset": "build.dataset",
                                     "clip": "checkpoint.CLIP"}},
            },
            {
                "plot": preview("The loss", "train.plot"),
                "save": {"type": "SaveImage", "title": "Crops, what is drawn for them, and the pictures",
                         "size": [380, 440], "widgets": {"filename_prefix": "palimpsest_samples"},
                         "inputs": {"images": "train.samples"}},
            },
        ),
    )  # fmt: skip


GRAPHS = {
    "16 Two pictures in a sentence (Multimodal)": sentence,
    "17 Style from a picture (Multimodal)": style,
    "18 Re-pose a subject shown by a picture (Multimodal)": with_kv,
    "19 Train a connector on your own pictures (Multimodal)": train,
}
