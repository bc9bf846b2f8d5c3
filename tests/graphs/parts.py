"""What the shipped workflows have in common: values, notes, and the nodes that most graphs hold.

A node is a dict: type, size, widgets by name, inputs as "node.output". Values that are not given keep the nodes'
defaults; all are those of SD 1.5 and its pictures (pocket.py has what the tests put in their place). Where a node lies
is not said: `graph` gives groups of columns, and author_workflows.mjs stacks them by the sizes that the editor finds.
"""

from __future__ import annotations

CHECKPOINT = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
    "v1-5-pruned-emaonly-fp16.safetensors?download=true",
    "directory": "checkpoints",
}
CAT, COFFEE, CLIP = "palimpsest_cat.webp", "palimpsest_coffee.webp", "palimpsest_coffee_clip.webp"
MASKED_CAT, MASKED_COFFEE = "palimpsest_cat_masked.webp", "palimpsest_coffee_masked.webp"
WIDTH, HEIGHT = 576, 384  # of these pictures
TUNING = "palimpsest_example"  # Save KV adds _00001.safetensors

AWAKE = "a close-up photo of a tabby cat looking ahead, eyes open"
ASLEEP = "a close-up photo of a tabby cat sleeping, eyes closed"
YAWNING = "a close-up photo of a tabby cat yawning, mouth open"
ACTIONS = "sleeping, eyes closed\nyawning, mouth open\nmeowing\nlooking up"
ANY_ACTION = "a close-up photo of a tabby cat {}"
CUP = "a photo of a red cup of coffee on a wooden table"
BLUE_CUP = "a photo of a blue cup of coffee on a wooden table"
STEPS, GUIDANCE, SCHEDULER = 30, 7.5, "normal"

COLOURS = {"yours": "#5fa3cf", "learned": "#a98bd0", "edit": "#6fb47c"}  # of the groups
NODES = {  # of the nodes in them: the host's pale blue, purple and green
    "yours": {"color": "#2a363b", "bgcolor": "#3f5159"},
    "learned": {"color": "#323", "bgcolor": "#535"},
    "edit": {"color": "#232", "bgcolor": "#353"},
}
NOTE = {"color": "#432", "bgcolor": "#653"}
WIDE = 380
BEFORE_AND_AFTER = "Before and after (needs Nodes 2.0)"


def graph(notes: dict[str, dict], *groups: dict) -> dict:
    """A whole description: the notes on the left, then the groups from left to right."""
    nodes = {key: node for each in groups for key, node in each["nodes"].items()}
    placed = [{**{k: v for k, v in each.items() if k != "nodes"}} for each in groups]
    return {"nodes": nodes | notes, "notes": list(notes), "groups": placed}


def group(title: str, kind: str, *columns: dict[str, dict]) -> dict:
    """A titled box with columns of nodes, all in its colour."""
    nodes = {key: {**node, "colour": NODES[kind]} for column in columns for key, node in column.items()}
    return {"title": title, "colour": COLOURS[kind], "columns": [list(column) for column in columns], "nodes": nodes}


def text(title: str, value: str | None, *, source: str | None = None, clip: str = "checkpoint.CLIP") -> dict:
    """A prompt, written here or (value None) linked from `source`."""
    node = {"type": "CLIPTextEncode", "title": title, "size": [WIDE, 110], "inputs": {"clip": clip}}
    return {**node, "inputs": {**node["inputs"], "text": source}} if source else {**node, "widgets": {"text": value}}


def negative() -> dict:
    return text("Negative prompt", "")


def note(title: str, value: str, height: int) -> dict:
    return {"type": "MarkdownNote", "title": title, "size": [440, height * 4 // 5], "note": value, "colour": NOTE}


def checkpoint(model: dict = CHECKPOINT) -> dict:
    """The editor offers to download what `models` names."""
    return {"type": "CheckpointLoaderSimple", "size": [WIDE, 110], "widgets": {"ckpt_name": model["name"]},
            "models": [model]}  # fmt: skip


def load_image(name: str, title: str | None = None) -> dict:
    node = {"type": "LoadImage", "size": [WIDE, 380], "widgets": {"image": name}}
    return {**node, "title": title} if title else node


def encode(image: str = "image.IMAGE", vae: str = "checkpoint.VAE") -> dict:
    return {"type": "VAEEncode", "size": [WIDE, 60], "inputs": {"pixels": image, "vae": vae}}


def decode(latent: str = "sample.LATENT", vae: str = "checkpoint.VAE") -> dict:
    return {"type": "VAEDecode", "size": [WIDE, 60], "inputs": {"samples": latent, "vae": vae}}


def invert(latent: str = "encode.LATENT", positive: str = "source.CONDITIONING") -> dict:
    return {
        "type": "PalimpsestInvert", "size": [WIDE, 290],
        "widgets": {"steps": STEPS, "scheduler": SCHEDULER},
        "inputs": {"model": "checkpoint.MODEL", "latent": latent, "positive": positive,
                   "negative": "negative.CONDITIONING", "vae": "checkpoint.VAE"},
    }  # fmt: skip


def sampler(model: str, positive: str, noise: str = "invert.noise") -> dict:
    """KSampler Advanced on noise that was found, not drawn."""
    return {
        "type": "KSamplerAdvanced", "size": [WIDE, 350],
        "widgets": {"add_noise": "disable", "noise_seed": 0, "control_after_generate": "fixed", "steps": STEPS,
                    "cfg": GUIDANCE, "sampler_name": "euler", "scheduler": SCHEDULER, "start_at_step": 0,
                    "end_at_step": 10000, "return_with_leftover_noise": "disable"},
        "inputs": {"model": model, "positive": positive, "negative": "negative.CONDITIONING", "latent_image": noise},
    }  # fmt: skip


def save(title: str = "The edited picture", images: str = "decode.IMAGE", height: int = 360) -> dict:
    return {"type": "SaveImage", "title": title, "size": [WIDE, height],
            "widgets": {"filename_prefix": "palimpsest_edit"}, "inputs": {"images": images}}  # fmt: skip


def save_clip(title: str, height: int, *, fps: float, lossless: bool) -> dict:
    """By the node that is the same in every version of the host; Create Video has other inputs in each."""
    return {"type": "SaveAnimatedWEBP", "title": title, "size": [WIDE, height],
            "widgets": {"filename_prefix": "palimpsest_clip", "fps": fps, "lossless": lossless, "quality": 90,
                        "method": "default"},
            "inputs": {"images": "decode.IMAGE"}}  # fmt: skip


def preview(title: str, images: str, height: int = 360) -> dict:
    return {"type": "PreviewImage", "title": title, "size": [WIDE, height], "inputs": {"images": images}}


def compare(before: str = "image.IMAGE", after: str = "decode.IMAGE", title: str = BEFORE_AND_AFTER) -> dict:
    """The host's own slider; only the newer renderer (Nodes 2.0) draws it."""
    return {"type": "ImageCompare", "title": title, "size": [WIDE, 350],
            "inputs": {"image_a": before, "image_b": after}}  # fmt: skip


def words(
    value: str | None, chosen: str, title: str = "The picture as it should be", clip: str = "checkpoint.CLIP"
) -> dict:
    """Select Words, with its text written here or (value None) linked from the node `prompt`."""
    node = {"type": "PalimpsestSelectWords", "title": title, "size": [WIDE, 180],
            "widgets": {"words": chosen}, "inputs": {"clip": clip}}  # fmt: skip
    if value is None:
        return {**node, "inputs": {**node["inputs"], "text": "prompt.STRING"}}
    return {**node, "widgets": {"text": value, **node["widgets"]}}


def mask_words(tokens: str, mask: str, model: str = "checkpoint.MODEL", **widgets) -> dict:
    return {"type": "PalimpsestCrossAttentionMask", "size": [WIDE, 300], "widgets": widgets,
            "inputs": {"model": model, "tokens": tokens, "mask": mask}}  # fmt: skip


def blend(model: str, mask: str, weights: str | None = None) -> dict:
    inputs = {"model": model, "trajectory": "invert.trajectory", "positive": "source.CONDITIONING", "mask": mask}
    return {"type": "PalimpsestFeatureBlend", "size": [WIDE, 400], "widgets": {"control_after_generate": "fixed"},
            "inputs": inputs | ({"blend_weights": weights} if weights else {})}  # fmt: skip


def keep_outside(mask: str) -> dict:
    return {"type": "PalimpsestKeepOutside", "size": [WIDE, 260], "widgets": {"grow": 4, "feather": 4},
            "inputs": {"source": "image.IMAGE", "edited": "decode.IMAGE", "mask": mask}}  # fmt: skip


def report(edited: str, mask: str, prompt: str, title: str = "Edit Report") -> dict:
    return {"type": "PalimpsestEditReport", "title": title, "size": [WIDE, 470], "widgets": {"prompt": prompt},
            "inputs": {"source": "image.IMAGE", "edited": edited, "mask": mask}}  # fmt: skip


def photo(name: str = MASKED_COFFEE, prompt: str = CUP) -> dict[str, dict]:
    """The first column: model, photo with its mask, the text of what it shows."""
    return {
        "checkpoint": checkpoint(),
        "image": load_image(name, "Your photo, with a mask"),
        "encode": encode(),
        "source": text("The picture as it is", prompt),
        "negative": negative(),
    }
