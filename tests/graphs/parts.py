"""What the shipped workflows have in common: values, notes, and the nodes that most graphs hold.

A node is a dict: type, place, size, widgets by name, inputs as "node.output". Values that are not given keep the
nodes' defaults.
"""

from __future__ import annotations

from pocket.settings import POCKET

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
MASKED_PICTURE = "palimpsest_example_masked.png"
RECOLOURED = "a blue cat standing on the right in the snow"
SIDE = 128  # of the example pictures

COLOURS = {"yours": "#3f789e", "learned": "#b58b2a", "edit": "#3f7a4a"}  # of the groups
NOTE = {"color": "#432", "bgcolor": "#653"}


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


def words(at: list[int], value: str | None, chosen: str, title: str = "The picture as it should be") -> dict:
    """Select Words, with its text written here or (value None) linked from the node `prompt`."""
    node = {"type": "PalimpsestSelectWords", "title": title, "at": at, "size": [380, 220],
            "widgets": {"words": chosen}, "inputs": {"clip": "checkpoint.CLIP"}}  # fmt: skip
    if value is None:
        return {**node, "inputs": {**node["inputs"], "text": "prompt.STRING"}}
    return {**node, "widgets": {"text": value, **node["widgets"]}}


def blend(at: list[int], model: str, mask: str, weights: str | None = None, **widgets) -> dict:
    inputs = {"model": model, "trajectory": "invert.trajectory", "positive": "source.CONDITIONING", "mask": mask}
    widgets = POCKET["PalimpsestFeatureBlend"] | {"control_after_generate": "fixed", **widgets}
    return {"type": "PalimpsestFeatureBlend", "at": at, "size": [380, 400], "widgets": widgets,
            "inputs": inputs | ({"blend_weights": weights} if weights else {})}  # fmt: skip


def keep_outside(at: list[int], mask: str) -> dict:
    return {"type": "PalimpsestKeepOutside", "at": at, "size": [380, 260], "widgets": {"grow": 4, "feather": 4},
            "inputs": {"source": "image.IMAGE", "edited": "decode.IMAGE", "mask": mask}}  # fmt: skip


def report(at: list[int], edited: str, mask: str, prompt: str, title: str = "Edit Report") -> dict:
    return {"type": "PalimpsestEditReport", "title": title, "at": at, "size": [380, 460], "widgets": {"prompt": prompt},
            "inputs": {"source": "image.IMAGE", "edited": edited, "mask": mask}}  # fmt: skip


def kept(at: list[int]) -> dict:
    return {**save(at), "inputs": {"images": "keep.image"}}


def photo() -> dict:
    """The first column: model, photo with its mask, the text of what it shows, and its inversion."""
    return {
        "checkpoint": checkpoint([40, 80]),
        "image": load_image([40, 250], MASKED_PICTURE, "Your photo, with a mask"),
        "encode": encode([40, 720], "image.IMAGE"),
        "source": text("The picture as it is", [40, 850], SOURCE),
        "negative": text("Negative prompt", [40, 1030], ""),
        "invert": invert([480, 80]),
    }
