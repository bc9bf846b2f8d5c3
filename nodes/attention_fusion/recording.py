"""In a pass of the source: its queries and keys, and where the words act whose shape may change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import attention_fusion as maths
from ...kernels.attention_map import indicator_values, mass_of_output
from .. import host

if TYPE_CHECKING:
    from .fusion import Fusion

# What is kept of the source: (SELF or CROSS, layer, "query" or "key") -> (B, N or S, C); (MASK,) -> (B, h, w)
SELF, CROSS, MASK = "self", "cross", "mask"
MASK_GRID = 16 * 16  # the published code finds the mask in layers of 16 x 16 places


class Recording:
    """Keep queries and keys, and the mass of the blend words, while every layer does as it would."""

    def __init__(self, fusion: Fusion, sigma: float):
        self.fusion, self.kinds = fusion, fusion.kinds(sigma)
        self.kept: dict[tuple, Tensor] = {}
        self.mass: dict[host.Grid, list[Tensor]] = {}

    def self_attention(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """The layer's own attention."""
        self.keep(SELF, query, key, options)
        return attend(query, key, value)

    def cross_attention(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """The layer's own attention."""
        self.keep(CROSS, query, key, options)
        if self.fusion.prompts.words is not None and self.fusion.mask is None and SELF in self.kinds:
            grid = tuple(options["activations_shape"][-2:])
            self.mass.setdefault(grid, []).append(self.mass_of_words(query, key, options).unflatten(1, grid))
        return attend(query, key, value)

    def mass_of_words(self, query: Tensor, key: Tensor, options: dict) -> Tensor:
        """The share that the blend words have of each place's attention, (B, N)."""
        heads, positions = options["n_heads"], self.fusion.prompts.words.every_position
        shown = indicator_values([positions], key.shape[1], heads, key.shape[-1] // heads).to(key)
        return mass_of_output(host.run_attention(options, None, query, key, shown.expand_as(key)), 1, heads)[..., 0]

    def keep(self, kind: str, query: Tensor, key: Tensor, options: dict) -> None:
        """Note a layer's query and key. Raises ValueError where they are not those of whole pictures."""
        layer = host.layer_key(options)
        if kind not in self.kinds or layer not in self.fusion.layers[kind]:
            return
        if len(options["cond_or_uncond"]) != 1:
            raise ValueError(
                f"the source's prompt has {len(options['cond_or_uncond'])} parts that act at once: leave schedules off "
                "the text encoder."
            )
        require_whole_picture(query, options)
        self.kept[kind, layer, "query"], self.kept[kind, layer, "key"] = query.detach(), key.detach()

    def pieces(self) -> host.Pieces:
        """All that was kept. Raises ValueError if the source never ran."""
        if not self.kept:
            raise ValueError("the source's prompt does not act at every step: leave schedules off the text encoder.")
        if not self.mass:
            return self.kept
        grid = min(self.mass, key=lambda size: abs(math.log(size[0] * size[1] / MASK_GRID)))
        mass = torch.stack(self.mass[grid]).mean(0)
        return self.kept | {(MASK,): maths.blend_mask(mass, self.fusion.threshold)}


def require_whole_picture(query: Tensor, options: dict) -> None:
    """Raise ValueError where queries are not one for each place."""
    height, width = options["activations_shape"][-2:]
    if query.shape[1] != height * width:
        raise ValueError(
            f"Attention Fusion cannot tell which place is which: a layer of {width} x {height} places asks for "
            f"{query.shape[1]} here because another node merges or tiles them (ToMe, HyperTile): take it out."
        )
