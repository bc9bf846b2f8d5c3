"""The blueprints that the pack ships: whole edits as one node, with a few inputs and a picture as their result.

A node is a dict: type, place, size, widgets by name, inputs as "node.output". What comes from outside (such as
"checkpoint.MODEL") and the widgets that a blueprint shows are its inputs, in the order of `inputs`: name -> the outside
source that it stands for, or the "node.widget" that it shows. Values are those of SD 1.5 and SDXL.
"""

from __future__ import annotations

from graphs import parts
from graphs.parts import GUIDANCE, SCHEDULER, STEPS

MODEL = {"model": "checkpoint.MODEL", "clip": "checkpoint.CLIP", "vae": "checkpoint.VAE", "image": "image.IMAGE"}
MASKED = {**MODEL, "mask": "image.MASK"}
# What stands on the blueprint's widgets, by the input's name.
LABELS = {
    "source_prompt": "the photo as it is", "edit_prompt": "the photo as it should be",
    "words": "words that change", "negative_prompt": "negative prompt",
}  # fmt: skip
EDITING, INPAINTING = (f"Image generation and editing/{kind}" for kind in ("Edit image", "Inpaint image"))
SIZES = "Use photos of the size your model was trained at: 512 pixels for SD 1.5, 1024 for SDXL."


def at(place: list[int], node: dict) -> dict:
    """A node of the templates, at a place."""
    return {**node, "at": place}


def text(title: str, at: list[int], value: str) -> dict:
    return {"type": "CLIPTextEncode", "title": title, "at": at, "size": [380, 140], "widgets": {"text": value},
            "inputs": {"clip": "checkpoint.CLIP"}}  # fmt: skip


def keep_outside(at: list[int], mask: str) -> dict:
    return {"type": "PalimpsestKeepOutside", "at": at, "size": [380, 260],
            "inputs": {"source": "image.IMAGE", "edited": "decode.IMAGE", "mask": mask}}  # fmt: skip


def levels(at: list[int]) -> dict:
    """The noise levels of inversion and sampling, in one place."""
    return {"type": "BasicScheduler", "title": "Noise levels", "at": at, "size": [380, 110],
            "widgets": {"scheduler": SCHEDULER, "steps": STEPS, "denoise": 1.0},
            "inputs": {"model": "checkpoint.MODEL"}}  # fmt: skip


def invert(at: list[int]) -> dict:
    return {"type": "PalimpsestInvert", "at": at, "size": [380, 350], "widgets": {"reconstruction_guidance": 0.0},
            "inputs": {"model": "checkpoint.MODEL", "latent": "encode.LATENT", "positive": "source.CONDITIONING",
                       "negative": "negative.CONDITIONING", "sigmas": "levels.SIGMAS"}}  # fmt: skip


def sampling(at: list[int], model: str, positive: str) -> dict:
    """From the inverted noise, over the same noise levels."""
    left, top = at
    return {
        "euler": {"type": "KSamplerSelect", "at": [left, top], "size": [380, 60],
                  "widgets": {"sampler_name": "euler"}},
        "sample": {"type": "SamplerCustom", "at": [left, top + 120], "size": [380, 400],
                   "widgets": {"add_noise": False, "noise_seed": 0, "control_after_generate": "fixed",
                               "cfg": GUIDANCE},
                   "inputs": {"model": model, "positive": positive, "negative": "negative.CONDITIONING",
                              "sampler": "euler.SAMPLER", "sigmas": "levels.SIGMAS",
                              "latent_image": "invert.noise"}},
    }  # fmt: skip


def photo(source: str) -> dict:
    """The photo, what it shows, and its inversion."""
    return {
        "encode": at([0, 0], parts.encode()),
        "source": text("The photo as it is", [0, 130], source),
        "negative": text("Negative prompt", [0, 350], ""),
        "levels": levels([0, 560]),
        "invert": invert([460, 0]),
    }


def change_an_action() -> dict:
    nodes = {
        **photo("a photo of a dog standing on a beach"),
        "edit": text("The photo as it should be", [460, 430], "a photo of a dog sitting on a beach"),
        "guidance": {"type": "PrimitiveFloat", "title": "Guidance", "at": [460, 650],
                     "size": [380, 60], "widgets": {"value": GUIDANCE}},
        "tune": {"type": "PalimpsestTuneKV", "at": [920, 0], "size": [380, 620], "widgets": {"inner_steps": 0},
                 "inputs": {"model": "checkpoint.MODEL", "trajectory": "invert.trajectory",
                            "positive": "source.CONDITIONING", "negative": "negative.CONDITIONING",
                            "guidance": "guidance.FLOAT"}},
        "apply": {"type": "PalimpsestApplyKV", "at": [1380, 0], "size": [380, 300],
                  "widgets": {"source_guidance": 3.0}, "inputs": {"model": "checkpoint.MODEL", "kv": "tune.kv"}},
        **sampling([1380, 380], "apply.MODEL", "edit.CONDITIONING"),
        "decode": at([1840, 0], parts.decode("sample.output")),
    }  # fmt: skip
    nodes["sample"]["inputs"]["cfg"] = "guidance.FLOAT"
    return {
        "nodes": nodes,
        "inputs": {**MODEL, "source_prompt": "source.text", "edit_prompt": "edit.text",
                   "negative_prompt": "negative.text", "steps": "levels.steps", "guidance": "guidance.value",
                   "source_guidance": "apply.source_guidance"},
        "output": "decode.IMAGE",
        "description": "Changes what someone does in a photo and keeps who it is: a new pose or action by the prompt, "
        "texture and identity from the photo (KV Inversion). Describe the photo as it is, then the same with another "
        f"action. {SIZES}",
        "aliases": ["edit photo", "pose", "action", "identity", "consistent character", "kv inversion"],
        "category": EDITING,
    }  # fmt: skip


def in_a_mask(source: str, edit: str, words: str, mask: str) -> dict:
    """Words of the prompt act where `mask` is white; all else stays."""
    return {
        **photo(source),
        "words": {"type": "PalimpsestSelectWords", "title": "The photo as it should be", "at": [460, 430],
                  "size": [380, 260], "widgets": {"text": edit, "words": words},
                  "inputs": {"clip": "checkpoint.CLIP"}},
        "mask": {"type": "PalimpsestCrossAttentionMask", "at": [920, 0], "size": [380, 320],
                 "inputs": {"model": "checkpoint.MODEL", "tokens": "words.tokens", "mask": mask}},
        "blend": {"type": "PalimpsestFeatureBlend", "at": [920, 400], "size": [380, 400],
                  "widgets": {"control_after_generate": "fixed"},
                  "inputs": {"model": "mask.MODEL", "trajectory": "invert.trajectory",
                             "positive": "source.CONDITIONING", "mask": mask}},
        **sampling([1380, 0], "blend.MODEL", "words.positive"),
        "decode": at([1840, 0], parts.decode("sample.output")),
        "keep": keep_outside([1840, 140], mask),
    }  # fmt: skip


WORDS = {
    "source_prompt": "source.text", "edit_prompt": "words.text", "words": "words.words",
    "negative_prompt": "negative.text", "steps": "levels.steps", "guidance": "sample.cfg",
}  # fmt: skip


def recolour() -> dict:
    return {
        "nodes": in_a_mask("a photo of a woman in a red dress", "a photo of a woman in a blue dress", "blue dress",
                           "image.MASK"),
        "inputs": {**MASKED, **WORDS},
        "output": "keep.image",
        "description": "Gives one thing another colour by a word, inside the mask; outside of it the photo stays as it "
        "is, bit for bit. Describe the photo, then the same with the new word, and name the words that are new. "
        f"{SIZES}",
        "aliases": ["recolor", "change color", "change colour", "edit photo", "colorize"],
        "category": EDITING,
    }  # fmt: skip


def background() -> dict:
    nodes = in_a_mask("a photo of a woman in a street", "a photo of a woman on a beach", "beach", "rest.MASK")
    nodes["rest"] = {"type": "InvertMask", "title": "Everything but the subject", "at": [460, 770], "size": [380, 40],
                     "inputs": {"mask": "image.MASK"}}  # fmt: skip
    return {
        "nodes": nodes,
        "inputs": {**MASKED, **WORDS},
        "output": "keep.image",
        "description": "Puts the subject of a photo into another place by words. The mask is white over what stays, "
        "and that stays bit for bit. Describe the photo, then the same with another place, and name the place's words. "
        f"{SIZES}",
        "aliases": ["change background", "edit photo", "backdrop", "new place"],
        "category": EDITING,
    }


def keep_everything_else() -> dict:
    nodes = {
        "encode": at([0, 0], parts.encode()),
        "edit": text("The photo as it should be", [0, 130], "a photo of a woman wearing sunglasses"),
        "negative": text("Negative prompt", [0, 350], ""),
        "limited": {"type": "SetLatentNoiseMask", "at": [460, 0], "size": [380, 60],
                    "inputs": {"samples": "encode.LATENT", "mask": "image.MASK"}},
        "sample": {"type": "KSampler", "at": [460, 130], "size": [380, 320],
                   "widgets": {"seed": 0, "control_after_generate": "fixed", "steps": STEPS, "cfg": GUIDANCE,
                               "sampler_name": "euler", "scheduler": SCHEDULER, "denoise": 0.8},
                   "inputs": {"model": "checkpoint.MODEL", "positive": "edit.CONDITIONING",
                              "negative": "negative.CONDITIONING", "latent_image": "limited.LATENT"}},
        "decode": at([920, 0], parts.decode("sample.LATENT")),
        "keep": keep_outside([920, 140], "image.MASK"),
    }  # fmt: skip
    return {
        "nodes": nodes,
        "inputs": {**MASKED, "edit_prompt": "edit.text", "negative_prompt": "negative.text", "seed": "sample.seed",
                   "steps": "sample.steps", "guidance": "sample.cfg", "denoise": "sample.denoise"},
        "output": "keep.image",
        "description": "Draws anew what the mask shows white and leaves every other pixel as it is, bit for bit; what "
        f"the way through the model shifted and tinted is undone. {SIZES}",
        "aliases": ["inpainting", "fill", "preserve", "edit photo"],
        "category": INPAINTING,
    }  # fmt: skip


BLUEPRINTS = {
    "Change an action or pose in a photo": change_an_action,
    "Recolour by a word": recolour,
    "Replace the background": background,
    "Keep everything else (inpaint)": keep_everything_else,
}


def described(name: str) -> dict:
    """What blueprints.mjs builds: nodes without their outside sources, and what each input is linked to."""
    given = BLUEPRINTS[name]()
    outside = {source: input for input, source in given["inputs"].items()}
    targets: dict[str, list[str]] = {input: [] for input in given["inputs"]}
    nodes = {}
    for key, node in given["nodes"].items():
        inside = {}
        for slot, source in node.get("inputs", {}).items():
            if source in outside:
                targets[outside[source]].append(f"{key}.{slot}")
            else:
                inside[slot] = source
        nodes[key] = {**node, "inputs": inside}
    for input, source in given["inputs"].items():
        targets[input] = targets[input] or [source]  # a widget of a node inside
    inputs = [{"name": name, "label": LABELS.get(name), "to": to} for name, to in targets.items()]
    return {
        "nodes": nodes,
        "blueprint": {"name": name, "inputs": inputs, "output": {"name": "image", "from": given["output"]}},
    }  # fmt: skip
