"""How people name layers: one grammar for every input that takes a list of them.

    input 7-8, middle, output 3.1, out                  double 0-5, single

A part is a place (input, middle, output, out in a U-Net; double, single in a transformer), a block's number or a range
of them where not all are meant, and .number for one of several transformer layers in a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...kernels.scripts import split_list
from .model import AttentionLayer, Place, places, self_attention_layers

PART = re.compile(r"(input|middle|output|out|double|single)(?: ?(\d+)(?: ?- ?(\d+))?)?(?:\.(\d+))?")


@dataclass(frozen=True)
class Part:
    """One part of a list of layers: its text, place, first and last block (None: all) and layer (None: all)."""

    text: str
    block: str
    first: int | None = None
    last: int | None = None
    index: int | None = None

    @property
    def numbers(self) -> range | None:
        """The blocks it names; None for all of the place."""
        return None if self.first is None else range(self.first, self.last + 1)

    def means(self, block: str, number: int, index: int | None = None) -> bool:
        """Whether it names a layer, or a block where no index is given."""
        in_block = self.block == block and (self.numbers is None or number in self.numbers)
        return in_block and (self.index is None or self.index == index)


def read_parts(text: str, name: str, example: str) -> list[Part]:
    """The parts of a list. Raises ValueError, with the input's name and an example, for anything else and for none."""
    found = []
    for written in (" ".join(part.lower().split()) for part in split_list(text)):
        match = PART.fullmatch(written)
        if match is None:
            raise ValueError(f"{name}: {written[:60]!r} names no layer; write for instance {example!r}.")
        block, first, last, index = match.groups()
        first, last, index = (None if number is None else int(number) for number in (first, last or first, index))
        found.append(Part(written, block, first, last, index))
    if not found:
        raise ValueError(f"{name} is empty: name layers, for instance {example!r}.")
    return found


SELF_ATTENTION: dict[str, Callable[[Place], bool]] = {
    "all": lambda place: True,
    "decoder": lambda place: place.layer.block == "output",
    "all but the finest": lambda place: place.level > 0,
    "finest": lambda place: place.level == 0,
}


def chosen_self_attention(model: Any, layers: str, technique: str) -> list[AttentionLayer]:
    """The self-attention layers of a choice. Raises ValueError where this model has none there."""
    present = {layer.key: layer for layer in self_attention_layers(model, technique)}
    chosen = [present[p.layer.key] for p in places(model) if SELF_ATTENTION[layers](p) and p.layer.key in present]
    if not chosen:
        raise ValueError(f"layers is {layers!r}, and this model has no self-attention there: set layers to all.")
    return chosen
