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
    negative,
    note,
    preview,
    sampler,
    save,
    words,
)
from kv.graph import tune

SENTENCE = "a <image1> cup on a table beside a <image2> cat"
STYLE = "a <image1> teapot on a kitchen table"
SUBJECT = "a close-up photo of a <image1> cat looking ahead, eyes open"
REPOSED = "a close-up photo of a <image1> cat sleeping, eyes closed"
CONTENTS = """a [man] and his bicycle in front of a brick wall
an old [woman] drinking tea in a garden
a [cat] on a windowsill, rain outside
a [robot] watering flowers on a balcony"""
STYLES = """a photo, natural light
an oil painting, thick brush strokes
a pencil drawing on white paper
a flat geometric poster, bold colours
claymation"""
SIDE = 512

NO_WEIGHTS = """**It needs weights that nobody has published for SD 1.5 or SDXL**: without a connector of your own,
which *Train a connector* makes, this can be read, not run.

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

**Tune KV** records the photo's keys and values under a prompt that shows the subject itself: what words leave out is in
the picture of it."""
)

START_TRAIN = """**It needs a vision-language model in models/palimpsest_encoders, hundreds of pictures, and days**:
nobody has published such a connector for SD 1.5 or SDXL.

## Train a connector on your own pictures

1. **Load Multimodal Encoder**: the vision-language model, connector *none*.
2. **Load Image-Text (from Folder)** in place of the example: some hundred captioned pictures.
3. **Build Multimodal Dataset**: choose a *detector* (a GroundingDINO folder in models/palimpsest_detectors), or connect
   masks as here. Look at the contact sheet: do the words fit the crops?
4. **Train Multimodal Encoder** writes the connector and the U-Net's LoRA as files. *preset* *in lessons* teaches the
   text encoder's words first, then drawing; *paper* is MUMU's training.

The paper trained 300,000 steps on five million pictures."""


START_SYNTHETIC = """## Pictures of your own checkpoint, to train an encoder on

1. **Synthetic Prompts**: what is shown, one to a line, with what is to be cut out in [brackets]; how it looks, one to a
   line. Each content comes in several styles: only so does an encoder learn which is which.
2. **Load Checkpoint**: the model that draws them, and that *Train a connector* trains for.
3. Queue: a picture for every prompt. **Attention Map** notes where the bracketed word acts while it is drawn, **Read
   Attention Map** makes a mask of it, **Build Multimodal Dataset** cuts it out: no detector is needed. Look at the
   contact sheet.

Several words in one content: choose a *detector* in Build Multimodal Dataset in place of the masks. A picker's scores
go into *scores* (*min_score*), photos of your own are another run with *min_picture*, *alike_bits* and *max_people*.

The paper drew three million pictures and kept those of a least PickScore."""


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
            "2 Record the photo under its own picture",
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


def synthetic() -> dict:
    sampled = new_picture()
    given = {"model": "watch.model", "positive": "words.positive", "negative": "negative.CONDITIONING",
             "seed": "prompts.seeds"}  # fmt: skip
    drawn = {**words("", "cat", "The prompt, its word chosen"), "widgets": {}}
    drawn["inputs"] = {"clip": "checkpoint.CLIP", "text": "prompts.prompts", "words": "prompts.words"}
    return graph(
        {"start": note("Start here", START_SYNTHETIC, 420)},
        group(
            "1 What is drawn, and how",
            "yours",
            {
                "checkpoint": checkpoint(),
                "prompts": {"type": "PalimpsestSyntheticPrompts", "size": [380, 400],
                            "widgets": {"contents": CONTENTS, "styles": STYLES, "styles_each": 3}},
                "empty": {**empty(), "widgets": {"width": SIDE, "height": SIDE, "batch_size": 1}},
            },
        ),
        group(
            "2 Drawn by your checkpoint",
            "learned",
            {
                "words": drawn,
                "negative": negative(),
                "watch": {"type": "PalimpsestAttentionMap", "size": [380, 180],
                          "inputs": {"model": "checkpoint.MODEL", "tokens": "words.tokens"}},
            },
            {
                "sample": {**sampled, "inputs": sampled["inputs"] | given},
                "decode": decode(),
                "save": save("The pictures"),
            },
        ),
        group(
            "3 Cut out by their words",
            "edit",
            {
                "read": {"type": "PalimpsestReadAttentionMap", "size": [380, 340],
                         "inputs": {"record": "watch.record", "samples": "sample.LATENT", "image": "decode.IMAGE"}},
                "build": {"type": "PalimpsestBuildMultimodalDataset", "size": [380, 480],
                          "widgets": {"name": "palimpsest_synthetic", "min_side": 75},
                          "inputs": {"images": "decode.IMAGE", "captions": "prompts.prompts",
                                     "words": "prompts.words", "masks": "read.mask"}},
            },
            {"sheet": preview("The contact sheet", "build.contact_sheet", 480)},
        ),
    )  # fmt: skip


GRAPHS = {
    "Two pictures in a sentence (Multimodal)": sentence,
    "Style from a picture (Multimodal)": style,
    "Re-pose a subject shown by a picture (Multimodal)": with_kv,
    "Train a connector on your own pictures (Multimodal)": train,
    "Synthetic pairs for a multimodal encoder (Multimodal)": synthetic,
}
