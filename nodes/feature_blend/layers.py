"""The features of a U-Net that can be blended: their names, sizes, and the choices that papers make among them.

A feature is the input of a block, as PFB-Diff counts: "input 8" is what input block 8 is given, "middle" what the
middle block is given, "output 0" what the middle block returns, "output 5" what output block 4 returns (before the
skip is joined to it), "out" what the last block returns. Skips are never blended by themselves.

A transformer's features are what its blocks return for the picture, "double 5" or "single 12". It has one size of
grid and no two halves; "input", "output" and "out" name the first half of its blocks, the second, and the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import host
from ..quoting import quoted

Feature = tuple[str, int]

MIDDLE, AFTER_MIDDLE, OUT = ("middle", 0), ("output", 0), ("out", 0)
EXAMPLE = "input 8-11, middle, output 1-5, out"


@dataclass(frozen=True)
class FeatureLayer:
    """One feature: the block whose input it is, its channels, and how often the latent was halved on the way to it."""

    block: str
    number: int
    channels: int
    halvings: int

    @property
    def key(self) -> Feature:
        """("input" | "middle" | "output" | "out", number)."""
        return self.block, self.number

    def __str__(self) -> str:
        return self.block if self.key in (MIDDLE, OUT) else f"{self.block} {self.number}"

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the feature for a latent of height x width; the host rounds halves up."""
        return self.channels, *(math.ceil(length / 2**self.halvings) for length in (height, width))

    def elements(self, height: int, width: int) -> int:
        """Numbers in the feature of one picture."""
        return math.prod(self.shape(height, width))


def feature_layers(model: Any, technique: str = "this node") -> list[FeatureLayer]:
    """Every feature of a host MODEL that can be blended, in the order in which a forward pass meets them."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample

    found, channels, halvings = [], 0, 0
    network = host.require_unet(model, technique)
    for name, number, block in host.blocks(network):
        found.append(FeatureLayer(name, number, channels, halvings))
        for layer in block or ():
            channels = getattr(layer, "out_channels", channels)
            halvings += isinstance(layer, Downsample) - isinstance(layer, Upsample)
    return [*found[1:], FeatureLayer(*OUT, channels, halvings)]  # the first block's input is the latent itself


def blendable(model: Any, technique: str = "this node") -> list[FeatureLayer]:
    """Every feature of a U-Net or of a transformer that can be blended, in the order of a forward pass."""
    family = host.require_words(model, technique)
    if family is None:
        return feature_layers(model, technique)
    network = model.model.diffusion_model
    channels, halvings = getattr(network, family.width), int(math.log2(host.patch_of(network)))
    return [FeatureLayer(*block, channels, halvings) for block in host.block_outputs(model, family)]


def of_transformer(layers: list[FeatureLayer]) -> bool:
    """Whether these are the blocks of a transformer."""
    return layers[0].block in ("double", "single")


def parse(text: str, layers: list[FeatureLayer]) -> list[FeatureLayer]:
    """The features named in a text such as "input 8-11, middle, output 1-5, out"; "output" alone is all of that place.

    Raises ValueError that names the part and what the model has.
    """
    wanted = [layer.key for part in host.read_parts(text, "layers", EXAMPLE) for layer in named(part, layers)]
    return [layer for layer in layers if layer.key in wanted]


def named(part: host.Part, layers: list[FeatureLayer]) -> list[FeatureLayer]:
    """The features that a part of the text names. Raises ValueError where the model lacks one of them."""
    if part.index is not None:
        raise ValueError(
            f"layers: {quoted(part.text)} names a layer inside of a block; features are whole blocks' inputs."
        )
    if of_transformer(layers) and part.first is None and part.block in HALVES:
        return HALVES[part.block](layers)
    found = [layer for layer in layers if part.means(layer.block, layer.number)]
    if not found or (part.numbers is not None and len(found) != len(part.numbers)):
        if of_transformer(layers):
            raise ValueError(
                f"layers: this transformer has no {quoted(part.text)}; its features are {written(layers)}, and input, "
                "output and out for its first half, its second and its last block."
            )
        present = [layer.number for layer in layers if layer.block == part.block]
        latent = " (the input of input block 0 is the latent: use blend_latents_until)" if part.block == "input" else ""
        raise ValueError(
            f"layers: this model has no {quoted(part.text)}; its features are {part.block} {present[0]} to "
            f"{present[-1]}{latent}."
        )
    return found


def coarse(layers: list[FeatureLayer]) -> list[FeatureLayer]:
    """Features at a quarter of the latent's side or less (one for 32 pixels), or at the coarsest the model has."""
    halvings = min(2, max(layer.halvings for layer in layers))
    return [layer for layer in layers if layer.halvings >= halvings]


def pfb_background(layers: list[FeatureLayer]) -> list[FeatureLayer]:
    """PFB-Diff's background script: input 7-11, middle, output 1-5 of SD 1.x; the same resolutions elsewhere."""
    return [layer for layer in coarse(layers) if layer.key != AFTER_MIDDLE]


def pfb_object(layers: list[FeatureLayer]) -> list[FeatureLayer]:
    """PFB-Diff's object script: input 8-11, middle, output 1-5 of SD 1.x; the same resolutions elsewhere."""
    return pfb_background(layers)[1:]


def paper(layers: list[FeatureLayer]) -> list[FeatureLayer]:
    """ "From the bottleneck layer towards the output layer": what the middle and every output block return.

    In a transformer, which has no bottleneck, the second half of the blocks.
    """
    if of_transformer(layers):
        return HALVES["output"](layers)
    return [layer for layer in layers if layer.block in ("output", "out")]


HALVES: dict[str, Callable[[list[FeatureLayer]], list[FeatureLayer]]] = {
    "input": lambda layers: layers[: len(layers) // 2],
    "output": lambda layers: layers[len(layers) // 2 :],
    "out": lambda layers: layers[-1:],
}
PRESETS: dict[str, Callable[[list[FeatureLayer]], list[FeatureLayer]]] = {
    "paper": paper,
    "PFB-Diff object": pfb_object,
    "PFB-Diff background": pfb_background,
}


def chosen(layers: str, present: list[FeatureLayer]) -> list[FeatureLayer]:
    """Of a model's features those of a preset, by its name, or those that a text names.

    Raises ValueError for a preset that chooses by sizes of grids where there is one size.
    """
    if layers in PRESETS and layers != "paper" and of_transformer(present):
        raise ValueError(
            f"preset {quoted(layers)} chooses features by the size of their grid, and a transformer has one: take "
            "custom, with layers 'output, out' (the second half of its blocks) to begin with."
        )
    return PRESETS[layers](present) if layers in PRESETS else parse(layers, present)


def written(layers: list[FeatureLayer]) -> str:
    """Features as `parse` reads them, runs of numbers joined."""
    parts: list[list[FeatureLayer]] = []
    for layer in layers:
        if parts and parts[-1][-1].key == (layer.block, layer.number - 1):
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1].number}" for run in parts)
