"""Good things to connect to every socket, and what other nodes may send instead of them.

BAD has, by socket type, what becomes of a good value: {name: function of it}. Each name is a value that a real node can
give: a mask of another size, a latent with NaN, a prompt that acts only part of the time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import comfy.sd
import tiny_models
import torch
from comfy import sd1_clip
from palimpsest.nodes.exact_text import TextEmbedder, shipped_recogniser
from text_control import writing

NAN, INF = math.nan, math.inf
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


class Target:
    """What the host's CLIP asks of a text encoder's family."""

    clip, tokenizer, params = sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer, {}


class VAE(tiny_models.AveragingVAE):
    """Colours averaged over 8 x 8 pixels, and back."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        picture = (latent[:, :3] + 4) / 8
        return torch.nn.functional.interpolate(picture, scale_factor=8).movedim(1, -1).clamp(0, 1)


def clip():
    """The host's CLIP of SD 1.x with a small random text model, as wide as the small U-Nets want it."""
    torch.manual_seed(0)
    options = {"clip_l_model_config": SMALL}
    with torch.inference_mode():
        made = comfy.sd.CLIP(Target(), embedding_directory=None, model_options=options)
        tiny_models.fill(made.cond_stage_model)
    return made


def flow():
    """The small U-Net, sampling as a flow-matching model."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(tiny_models.unet(), 3.0)[0]


def mask() -> torch.Tensor:
    found = torch.zeros(1, 64, 64)
    found[:, 8:56, 8:40] = 1
    return found


def text_embedder() -> TextEmbedder:
    """A random one for the small text encoder."""
    width = SMALL["hidden_size"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, 2560, generator=generator) / 50
    ones, zeros = torch.ones(width), torch.zeros(width)
    projection = {"weight": weight, "bias": zeros, "norm_weight": ones, "norm_bias": zeros}
    return TextEmbedder(shipped_recogniser(), projection)


def prompt(seed: int) -> list:
    """A prompt for every family: the pooled output is left aside where none is wanted."""
    return tiny_models.prompt(seed, family="sdxl")


THINGS = {
    "clip": clip,
    "vae": VAE,
    "image": lambda: tiny_models.picture(seed=1),
    "edited": lambda: tiny_models.picture(seed=2),
    "mask": mask,
    "latent": tiny_models.latent,
    "positive": lambda: prompt(1),
    "target": lambda: prompt(3),
    "negative": lambda: prompt(2),
    "large": lambda: tiny_models.picture(1, 2500, 2500, 1),
    "large edit": lambda: tiny_models.picture(1, 2500, 2500, 2),
    "large mask": lambda: torch.nn.functional.pad(torch.ones(1, 1000, 1000), (700, 800, 700, 800)),
    "boxes": lambda: [[{"x": 8, "y": 8, "width": 32, "height": 48}]],
    "caption": lambda: "a red dog in the snow",
    "text embedder": text_embedder,
    "text control": writing.control,
    "flow": flow,
} | {family: lambda family=family: tiny_models.unet(family) for family in tiny_models.FAMILIES if "-" not in family}
OTHER_MODELS = ("sdxl", "sd15-inpaint", "sd15-instruct", "sdxl-inpaint", "wide")


def model(family: str) -> Any:
    """A model of another family; "wide" reads texts of another width."""
    if family != "wide":
        return tiny_models.unet(family)
    tiny_models.FAMILIES["wide"] = ("SD15", "BaseModel", tiny_models.SD15 | {"context_dim": 48})
    return tiny_models.unet("wide")


def with_one(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy with a value in its middle."""
    flat = tensor.flatten().clone()
    flat[len(flat) // 2] = value
    return flat.view(tensor.shape)


FINITE = {
    "all nan": lambda x: x * NAN,
    "one nan": lambda x: with_one(x, NAN),
    "inf": lambda x: with_one(x, INF),
    "huge": lambda x: x + 1e30,
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
}
MASKS = FINITE | {
    "empty": torch.zeros_like,
    "full": torch.ones_like,
    "negative": lambda x: -x,
    "other size": lambda x: x[:, :41, :23],
    "three": lambda x: x.repeat(3, 1, 1),
    "no pictures": lambda x: x[:0],
    "1 x 1": lambda x: x[:, :1, :1],
    "0 x 0": lambda x: x[:, :0, :0],
    "2-D": lambda x: x[0],
    "4-D": lambda x: x[:, None],
    "5-D": lambda x: x[:, None, None],
    "1-D": lambda x: x[0, 0],
    "0-D": lambda x: x[0, 0, 0],
    "whole numbers": lambda x: x.long(),
    "bytes": lambda x: (x * 255).byte(),
    "bool": lambda x: x.bool(),
    "a list": lambda x: [x],
}
IMAGES = FINITE | {
    "1 x 1": lambda x: x[:, :1, :1],
    "odd": lambda x: x[:, :41, :23],
    "4 channels": lambda x: torch.cat([x, x[..., :1]], -1),
    "1 channel": lambda x: x[..., :1],
    "2 channels": lambda x: x[..., :2],
    "5 channels": lambda x: torch.cat([x, x[..., :2]], -1),
    "0 channels": lambda x: x[..., :0],
    "no pictures": lambda x: x[:0],
    "three": lambda x: x.repeat(3, 1, 1, 1),
    "3-D": lambda x: x[0],
    "2-D": lambda x: x[0, ..., 0],
    "5-D": lambda x: x[None],
    "0 x 0": lambda x: x[:, :0, :0],
    "negative": lambda x: -x,
    "bytes": lambda x: (x * 255).byte(),
    "whole numbers": lambda x: x.long(),
    "black": torch.zeros_like,
    "narrow": lambda x: x[:, :7].repeat(1, 1, 5, 1),
}


def latents(change: Any) -> Any:
    return lambda latent: latent | {"samples": change(latent["samples"])}


LATENTS = {name: latents(change) for name, change in FINITE.items()} | {
    name: latents(change)
    for name, change in {
        "16 channels": lambda x: x.repeat(1, 4, 1, 1),
        "3 channels": lambda x: x[:, :3],
        "three": lambda x: x.repeat(3, 1, 1, 1),
        "no pictures": lambda x: x[:0],
        "1 x 1": lambda x: x[..., :1, :1],
        "2 x 2": lambda x: x[..., :2, :2],
        "odd": lambda x: x[..., :7, :5],
        "0 x 0": lambda x: x[..., :0, :0],
        "3-D": lambda x: x[0],
        "5-D": lambda x: x[:, :, None],
        "whole numbers": lambda x: x.long(),
        "zeros": torch.zeros_like,
        "a list": lambda x: [x],
    }.items()
}
LATENTS |= {
    "without samples": lambda latent: {"noise_mask": torch.ones(1, 64, 64)},
    "with a mask": lambda latent: latent | {"noise_mask": torch.ones(1, 64, 64)},
    "samples of None": lambda latent: {"samples": None},
}
SIGMAS = {
    "ascending": lambda x: x.flip(0),
    "empty": lambda x: x[:0],
    "one": lambda x: x[:1],
    "a zero": lambda x: x[-1:],
    "nan": lambda x: with_one(x, NAN),
    "inf": lambda x: with_one(x, INF),
    "twice the same": lambda x: torch.cat([x[:1], x]),
    "without end": lambda x: x[:-1],
    "negative": lambda x: -x,
    "zeros": torch.zeros_like,
    "beyond": lambda x: x * 1000,
    "2-D": lambda x: x[None],
    "whole numbers": lambda x: x.long(),
}


def told(**more: Any) -> Any:
    return lambda prompt: [[tensor, extra | more] for tensor, extra in prompt]


def texts(change: Any) -> Any:
    return lambda prompt: [[change(tensor), extra] for tensor, extra in prompt]


PROMPTS = {name: texts(change) for name, change in FINITE.items()} | {
    "no prompts": lambda prompt: [],
    "no tokens": texts(lambda x: x[:, :0]),
    "one token": texts(lambda x: x[:, :1]),
    "154 tokens": texts(lambda x: x.repeat(1, 22, 1)),
    "another width": texts(lambda x: torch.cat([x, x], -1)),
    "narrower": texts(lambda x: x[..., :5]),
    "2-D": texts(lambda x: x[0]),
    "three rows": texts(lambda x: x.repeat(3, 1, 1)),
    "whole numbers": texts(lambda x: x.long()),
    "two": lambda prompt: [*prompt, *prompt],
    "first half": told(start_percent=0.0, end_percent=0.5),
    "never": told(start_percent=0.7, end_percent=0.7),
    "late": told(start_percent=0.9, end_percent=1.0),
    "both halves": lambda prompt: [
        *told(start_percent=0.0, end_percent=0.5)(prompt), *told(start_percent=0.5, end_percent=1.0)(prompt)
    ],
    "an area": told(area=(4, 4, 0, 0), strength=1.0),
    "an area outside": told(area=(64, 64, 60, 60), strength=1.0),
    "an area in percent": told(area=("percentage", 0.5, 0.5, 0.0, 0.0), strength=1.0),
    "a mask": told(mask=torch.ones(1, 64, 64), mask_strength=1.0),
    "strength 0": told(strength=0.0),
    "strength nan": told(strength=NAN),
    "without pooled output": lambda prompt: [[tensor, {}] for tensor, _ in prompt],
    "pooled output of another width": told(pooled_output=torch.ones(1, 7)),
    "pooled output nan": told(pooled_output=torch.full((1, 1280), NAN)),
}  # fmt: skip
BOXES = {
    name: lambda _, box=box: [[box]]
    for name, box in {
        "nan": {"x": NAN, "y": 0, "width": 32, "height": 32},
        "inf": {"x": 0, "y": 0, "width": INF, "height": 32},
        "negative": {"x": -20, "y": -20, "width": 50, "height": 50},
        "outside": {"x": 500, "y": 500, "width": 32, "height": 32},
        "words": {"x": "a", "y": 0, "width": 32, "height": 32},
        "without height": {"x": 0, "y": 0, "width": 32},
        "nothing": None,
        "flat": {"x": 3, "y": 3, "width": 0, "height": 9},
        "huge": {"x": 0, "y": 0, "width": 10**18, "height": 10**18},
    }.items()
} | {"empty": lambda _: [], "one box": lambda boxes: boxes[0][0]}


def changed(**changes: Any) -> Any:
    """What becomes of an object of ours: its fields, each by a function of the object."""
    return lambda thing: replace(thing, **{name: change(thing) for name, change in changes.items()})


TRAJECTORIES = {
    "nan": changed(latents=lambda t: t.latents * NAN),
    "no levels": changed(sigmas=lambda t: ()),
    "no pictures": changed(latents=lambda t: t.latents[:, :0]),
    "another architecture": changed(layout=lambda t: "0" * 16),
    "ascending": changed(sigmas=lambda t: t.sigmas[::-1]),
    "sigma nan": changed(sigmas=lambda t: (NAN, *t.sigmas[1:])),
    "other size": changed(latents=lambda t: t.latents[..., :5, :7]),
    "three": changed(latents=lambda t: t.latents.repeat(1, 3, 1, 1, 1)),
    "too few latents": changed(latents=lambda t: t.latents[1:]),
    "3 channels": changed(latents=lambda t: t.latents[:, :, :3]),
}
KVS = {
    "another architecture": changed(layout=lambda kv: "0" * 16),
    "noise nan": changed(noise=lambda kv: kv.noise * NAN),
    "scalars nan": changed(scalars=lambda kv: kv.scalars * NAN),
    "pieces nan": changed(learned=lambda kv: tuple(t if t is None else t * NAN for t in kv.learned)),
    "ascending": changed(sigmas=lambda kv: kv.sigmas[::-1]),
    "no layers": changed(layers=lambda kv: ()),
}
TOKENS = {
    "nan": changed(prompt=lambda w: w.prompt * NAN),
    "no words": changed(words=lambda w: (), positions=lambda w: ()),
    "another prompt": changed(prompt=lambda w: w.prompt + 1),
    "behind the end": changed(positions=lambda w: ((900,),)),
}
WEIGHTS = {
    "nan": changed(alphas=lambda w: dict.fromkeys(w.alphas, NAN)),
    "another architecture": changed(layout=lambda w: "0" * 16),
    "none": changed(alphas=lambda w: {}),
    "other names": changed(alphas=lambda w: {"output 99": 0.5}),
}
TEXT_LINES = {
    "nan": changed(glyphs=lambda t: t.glyphs * NAN),
    "no lines": changed(lines=lambda t: ()),
    "too few strips": changed(strips=lambda t: t.strips[:0]),
    "other size": changed(size=lambda t: (8, 8)),
    "a polygon of two": changed(lines=lambda t: tuple(replace(line, polygon=line.polygon[:2]) for line in t.lines)),
    "a polygon nan": changed(lines=lambda t: tuple(replace(line, polygon=line.polygon * NAN) for line in t.lines)),
}
EMBEDDERS = {
    "nan": changed(projection=lambda e: {name: tensor * NAN for name, tensor in e.projection.items()}),
    "nothing": changed(projection=lambda e: {}),
    "another width": changed(projection=lambda e: {**e.projection, "bias": torch.zeros(7)}),
}
BAD = {
    "MASK": MASKS,
    "IMAGE": IMAGES,
    "LATENT": LATENTS,
    "SIGMAS": SIGMAS,
    "CONDITIONING": PROMPTS,
    "BOUNDING_BOX": BOXES,
    "PALIMPSEST_TRAJECTORY": TRAJECTORIES,
    "PALIMPSEST_KV": KVS,
    "PALIMPSEST_TOKENS": TOKENS,
    "PALIMPSEST_BLEND_WEIGHTS": WEIGHTS,
    "PALIMPSEST_TEXT_LINES": TEXT_LINES,
    "PALIMPSEST_TEXT_EMBEDDER": EMBEDDERS,
}
for each in BAD.values():
    each["nothing at all"] = lambda _: None
TEXTS = {
    "empty": "",
    "spaces": "   \n\t ",
    "long": "a red cat " * 10_000,
    "nul": "a \0 cat",
    "right to left": "\u202egnp.exe \u0627\u0644\u0642",
    "emoji": "\U0001f408\u200d\u2b1b" * 30,
    "image 0": "a <image0> dog",
    "image 99": "a <image99> dog",
    "unbalanced": "a <image1 dog ((((cat:1.5) >",
    "weights": "(a:1e30) (b:nan) [c",
    "a weight of nan": "a red (cat:nan) (dog:inf)",
    "decimal comma": "a <image1:0,7> dog",
    "markup": "<script>alert(1)</script>",
    "brackets": "(" * 3000 + "cat" + ")" * 3000,
    "surrogate": "a \ud800 cat",
    "format": "{0} {x!r} %s %n",
    "path": "../../../etc/passwd",
    "device": "CON",
    "layers": "input 99, nonsense, middle-",
}
NUMBERS = {"NaN": "NaN", "nan": NAN, "inf": INF, "word": "abc", "nothing": None, "list": [1]}
