"""The layers in which a mask acts: presets, and lists that a person writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import host
from ..quoting import quoted


def in_pfb_diff_object(place: host.Place) -> bool:
    """PFB-Diff's layers for an object (a), at their sizes in SD 1.5: 16 x 16 and 8 x 8, 32 x 32 in the decoder but one.

    The levels are counted from the finest, so that in SDXL, whose finest is 64 x 64 as well, the sizes are the same.
    """
    behind = place.layer.block == "output" and not place.last
    return place.layer.block == "middle" or place.level > 1 or (place.level == 1 and behind)


CUSTOM, EXAMPLE = "custom", "input 1-4, middle, output 3"
PFB_OBJECT = "input 7-8, middle, output 3-7"  # PFB-Diff's layers for an object, in SD 1.5
PRESETS: dict[str, Callable[[host.Place], bool]] = {
    "all": lambda place: True,
    "PFB-Diff object": in_pfb_diff_object,
    "PFB-Diff background": lambda place: place.layer.block == "middle" or place.level > 0,
    "1/1 of the latent": lambda place: place.scale == 1,
    "1/2 of the latent": lambda place: place.scale == 2,
    "1/4 of the latent": lambda place: place.scale == 4,
    "1/8 of the latent": lambda place: place.scale == 8,
}
LAYERS = [*PRESETS, CUSTOM]


def choose_layers(model: Any, layers: str, custom: str = "") -> list[host.AttentionLayer]:
    """The layers of a preset, or those that `custom` lists. Raises ValueError, naming what exists, if there are none.

    custom: host.read_parts reads it.
    """
    available = host.places(model)
    if layers == CUSTOM:
        return listed_layers([place.layer for place in available], custom)
    chosen = [place.layer for place in available if PRESETS[layers](place)]
    if not chosen:
        scales = ", ".join(f"1/{scale}" for scale in sorted({place.scale for place in available}))
        raise ValueError(f"this model looks at the prompt at {scales} of the latent, not in layers {layers!r}.")
    return chosen


def listed_layers(available: list[host.AttentionLayer], custom: str) -> list[host.AttentionLayer]:
    """The layers that `custom` lists, in the network's order."""
    there = f"This model looks at the prompt in {in_words(available)}."
    try:
        parts = host.read_parts(custom, "custom_layers", EXAMPLE)
    except ValueError as error:
        raise ValueError(f"{error} {there}") from None
    for part in parts:
        if not any(part.means(*layer.key) for layer in available):
            raise ValueError(f"custom_layers: {quoted(part.text)} is no such layer. {there}")
    return [layer for layer in available if any(part.means(*layer.key) for part in parts)]


def in_words(available: list[host.AttentionLayer]) -> str:
    """The blocks of layers, in words."""
    blocks: dict[str, set[int]] = {}
    for layer in available:
        blocks.setdefault(layer.block, set()).add(layer.number)
    return "; ".join(
        name if name == "middle" else f"{name} {', '.join(map(str, sorted(numbers)))}"
        for name, numbers in blocks.items()
    )
