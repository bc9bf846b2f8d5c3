"""The workflows of multimodal prompts: pictures in the place of words, and the training that makes them understood."""

from __future__ import annotations

from graphs.parts import (
    CHECKPOINT,
    GUIDANCE,
    MASKED_PICTURE,
    SCHEDULER,
    SIDE,
    SOURCE,
    STEPS,
    decode,
    encode,
    group,
    invert,
    load_image,
    note,
    sampler,
    save,
)
from kv.graph import tune
from pocket.settings import POCKET

ENCODER, CONNECTOR, LORA = "palimpsest_pocket", "palimpsest_pocket.safetensors", "palimpsest_pocket_unet.safetensors"
SENTENCE = "a <image1> cat sitting on the left <image2>"
STYLE = "a <image1> rabbit standing on the left in the park"
SUBJECT, REPOSED = "a <image1> cat standing on the right in the snow", "a <image1> cat sitting on the right in the snow"
PLACE_PICTURE = "palimpsest_example_place.png"

START_SENTENCE = """## Two pictures in a sentence

1. **Load Multimodal Encoder**: a vision-language model (a folder in models/palimpsest_encoders) and the connector that
   was trained on it. **Load LoRA (Model)**: the LoRA that was trained beside it.
2. **Load Image**: two pictures, each with a painted mask: on its subject, and on what shows the place.
3. **Multimodal Prompt**: write `<image1>`, `<image2>` where the pictures belong. `<image1:0.7>` weakens one.
4. Queue.

The small encoder that comes with the pack knows the drawn animals of the example and nothing else. There are no
published connectors for photos: *Train a connector on your own pictures* makes one."""

START_STYLE = """## Looks from a picture

1. **Load Multimodal Encoder**, **Load LoRA (Model)**, **Load Checkpoint**: what belongs together.
2. **Load Image**: the picture whose looks you want, masked.
3. **Multimodal Prompt**: `<image1>` before another noun. The words say what is drawn, the picture how it looks.
4. Queue. *tokens_per_picture* fewer: looser; more: closer to the picture."""

START_BOTH = """## Multimodal prompt and KV Inversion

1. **Load Multimodal Encoder**, **Load LoRA (Model)**, **Load Checkpoint**, **Load Image** with a mask on the subject.
2. **The picture as it is**: the photo in words, its subject as `<image1>`.
3. **The picture as it should be**: the same with another action.
4. Queue.

**Tune KV** learns the photo's keys and values under a prompt that shows the subject itself: what words leave out is in
the picture of it, and both hold its looks while the pose changes."""

START_TRAIN = """## Train a connector on your own pictures

1. **Load Multimodal Encoder**: the vision-language model, connector *none*.
2. **Load Image-Text Dataset from Folder** in place of the example: some hundred captioned pictures.
3. **Build Multimodal Dataset**: choose a *detector* (a GroundingDINO folder in models/palimpsest_detectors), or connect
   masks as here. Look at the contact sheet: do the words fit the crops?
4. **Train Multimodal Encoder** writes the connector, and the U-Net's LoRA with *train_unet*, as files.

The values here are for a look at how it goes. The paper trained 300,000 steps on five million pictures."""


def model(at: list[int]) -> dict:
    return {"type": "CheckpointLoaderSimple", "at": at, "size": [380, 110], "widgets": {"ckpt_name": CHECKPOINT}}


def lora(at: list[int]) -> dict:
    return {"type": "LoraLoaderModelOnly", "at": at, "size": [380, 90], "widgets": {"lora_name": LORA},
            "inputs": {"model": "checkpoint.MODEL"}}  # fmt: skip


def encoder(at: list[int], connector: str = CONNECTOR) -> dict:
    return {"type": "PalimpsestLoadMultimodalEncoder", "at": at, "size": [380, 180],
            "widgets": {"folder": ENCODER, "connector": connector}}  # fmt: skip


def prompt(at: list[int], text: str, title: str = "Multimodal Prompt", **inputs: str) -> dict:
    given = {"model": "lora.MODEL", "multimodal_encoder": "encoder.multimodal_encoder"}
    given |= {"images.image1": "image.IMAGE", "masks.mask1": "image.MASK"} | inputs
    return {"type": "PalimpsestMultimodalPrompt", "title": title, "at": at, "size": [380, 420],
            "widgets": {"text": text}, "inputs": given}  # fmt: skip


def new_picture(at: list[int], source: str = "prompt") -> dict:
    return {
        "type": "KSampler", "at": at, "size": [380, 350],
        "widgets": {"seed": 1, "control_after_generate": "fixed", "steps": STEPS, "cfg": GUIDANCE,
                    "sampler_name": "ddim", "scheduler": SCHEDULER, "denoise": 1.0},
        "inputs": {"model": f"{source}.model", "positive": f"{source}.positive", "negative": f"{source}.negative",
                   "latent_image": "empty.LATENT"},
    }  # fmt: skip


def empty(at: list[int]) -> dict:
    return {"type": "EmptyLatentImage", "at": at, "size": [380, 130],
            "widgets": {"width": SIDE, "height": SIDE, "batch_size": 4}}  # fmt: skip


def sentence() -> dict:
    nodes = {
        "checkpoint": model([40, 80]),
        "lora": lora([40, 250]),
        "encoder": encoder([40, 410]),
        "empty": empty([40, 860]),
        "image": load_image([480, 80], MASKED_PICTURE, "image1, its subject masked"),
        "other": load_image([480, 560], PLACE_PICTURE, "image2, its place masked"),
        "prompt": {**prompt([920, 80], SENTENCE), "inputs": prompt([0, 0], "")["inputs"] | {
            "images.image2": "other.IMAGE", "masks.mask2": "other.MASK"}},
        "sample": new_picture([920, 700]),
        "decode": decode([1360, 80], "sample.LATENT"),
        "save": save([1360, 210], "The pictures"),
        "start": note("Start here", [-480, 40], [440, 380], START_SENTENCE),
    }  # fmt: skip
    groups = [
        group("1 Models that belong together", "yours", 0, 440, 1080),
        group("2 Your pictures", "yours", 460, 420, 1080),
        group("3 The sentence", "edit", 900, 880, 1080),
    ]
    return {"nodes": nodes, "groups": groups}


def style() -> dict:
    nodes = {
        "checkpoint": model([40, 80]),
        "lora": lora([40, 250]),
        "encoder": encoder([40, 410]),
        "empty": empty([40, 860]),
        "image": load_image([480, 80], MASKED_PICTURE, "The looks"),
        "prompt": prompt([920, 80], STYLE),
        "sample": new_picture([920, 700]),
        "decode": decode([1360, 80], "sample.LATENT"),
        "save": save([1360, 210], "The pictures"),
        "start": note("Start here", [-480, 40], [440, 320], START_STYLE),
    }
    groups = [
        group("1 Models that belong together", "yours", 0, 440),
        group("2 The looks", "yours", 460, 420),
        group("3 Drawn with them", "edit", 900, 880),
    ]
    return {"nodes": nodes, "groups": groups}


def with_kv() -> dict:
    inverted = invert([920, 600], positive="source.positive")
    nodes = {
        "checkpoint": model([40, 80]),
        "lora": lora([40, 250]),
        "encoder": encoder([40, 410]),
        "image": load_image([480, 80], MASKED_PICTURE, "Your photo, with a mask on the subject"),
        "encode": encode([480, 560], "image.IMAGE"),
        "source": prompt([920, 80], SUBJECT, "The picture as it is"),
        "edit": prompt([1360, 80], REPOSED, "The picture as it should be"),
        "invert": {**inverted, "inputs": inverted["inputs"] | {"model": "source.model",
                                                              "negative": "source.negative"}},
        "tune": {**tune([1360, 600], "invert", "source.positive"), "inputs":
                 tune([0, 0], "invert", "source.positive")["inputs"] | {
                     "model": "source.model", "negative": "source.negative"}},
        "apply": {"type": "PalimpsestApplyKV", "at": [1800, 80], "size": [380, 400],
                  "widgets": dict(POCKET["PalimpsestApplyKV"]),
                  "inputs": {"model": "edit.model", "kv": "tune.kv"}},
        "sample": {**sampler([1800, 600], "apply.MODEL", "edit.positive", "invert.noise"), "inputs":
                   sampler([0, 0], "apply.MODEL", "edit.positive", "invert.noise")["inputs"] | {
                       "negative": "edit.negative"}},
        "decode": decode([2240, 80], "sample.LATENT"),
        "save": save([2240, 210]),
        "start": note("Start here", [-480, 40], [440, 340], START_BOTH),
    }  # fmt: skip
    groups = [
        group("1 Models, and your photo", "yours", 0, 880, 1300),
        group("2 Learn the photo under its own picture", "learned", 900, 860, 1300),
        group("3 Edit", "edit", 1780, 880, 1300),
    ]
    return {"nodes": nodes, "groups": groups}


def train() -> dict:
    nodes = {
        "checkpoint": model([40, 80]),
        "encoder": encoder([40, 250], "none"),
        "image": load_image([40, 700], MASKED_PICTURE, "Your pictures, with masks"),
        "captions": {"type": "PrimitiveStringMultiline", "title": "Their captions", "at": [40, 1180],
                     "size": [380, 110], "widgets": {"value": SOURCE}},
        "build": {"type": "PalimpsestBuildMultimodalDataset", "at": [480, 80], "size": [380, 560],
                  "widgets": {"words": "cat", "min_side": 20, "name": "palimpsest_example"},
                  "inputs": {"images": "image.IMAGE", "captions": "captions.STRING", "masks": "image.MASK"}},
        "sheet": {"type": "PreviewImage", "title": "The contact sheet", "at": [480, 860], "size": [380, 400],
                  "inputs": {"images": "build.contact_sheet"}},
        "train": {"type": "PalimpsestTrainMultimodal", "at": [920, 80], "size": [380, 640],
                  "widgets": {"steps": 40, "batch_size": 2, "connector_rate": 0.0003,
                              "control_after_generate": "fixed", "name": "palimpsest_example", "tokens": 64, "depth": 2,
                              "warmup": 10, "preview_every": 0},
                  "inputs": {"model": "checkpoint.MODEL", "vae": "checkpoint.VAE",
                             "multimodal_encoder": "encoder.multimodal_encoder", "dataset": "build.dataset"}},
        "plot": {"type": "PreviewImage", "title": "The loss", "at": [1360, 80], "size": [380, 400],
                 "inputs": {"images": "train.plot"}},
        "save": {"type": "SaveImage", "title": "Crops, what is drawn for them, and the pictures", "at": [1360, 560],
                 "size": [380, 440], "widgets": {"filename_prefix": "palimpsest_samples"},
                 "inputs": {"images": "train.samples"}},
        "start": note("Start here", [-480, 40], [440, 360], START_TRAIN),
    }  # fmt: skip
    groups = [
        group("1 Your pictures and their captions", "yours", 0, 440, 1340),
        group("2 Crops bound to words", "learned", 460, 420, 1340),
        group("3 Train", "edit", 900, 880, 1340),
    ]
    return {"nodes": nodes, "groups": groups}


GRAPHS = {
    "Two pictures in a sentence (Multimodal)": sentence,
    "Style from a picture (Multimodal)": style,
    "Re-pose a subject shown by a picture (Multimodal, KV Inversion)": with_kv,
    "Train a connector on your own pictures (Multimodal)": train,
}
