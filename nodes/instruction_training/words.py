"""Cross-attention masks in a training: the instruction acts inside of each triple's mask alone (the paper's eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.instruction_training import words_within
from .. import host


@dataclass
class WordsInside:
    """Where the words of the running call act: masks (B, 1, h, w), white all over for a row without one, or None."""

    masks: Tensor | None = None

    def look(self, masks: Sequence[Tensor | None]) -> None:
        """Of the rows of the next call."""
        known = next((mask for mask in masks if mask is not None), None)
        self.masks = None
        if known is not None:
            self.masks = torch.cat([torch.ones_like(known) if mask is None else mask for mask in masks])

    def on(self, query: Tensor, options: dict) -> Tensor:
        """The masks at the places (B, N) of the layer that calls."""
        size = options["activations_shape"][-2:]
        return F.adaptive_avg_pool2d(self.masks.to(query.device), size).flatten(1)


@dataclass(frozen=True)
class MaskedWords:
    """attn2 replacement: the layer's attention, where the words act. What another node put here is added to alike."""

    inside: WordsInside
    previous: Any = None

    @host.not_compiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        if self.inside.masks is None:
            return host.run_attention(options, self.previous, query, key, value)
        plain = host.run_attention(options, None, query, key, value)
        within = words_within(plain, self.inside.on(query, options))
        return within if self.previous is None else self.previous(query, key, value, options) + within - plain


def attach(patched: Any, inside: WordsInside, technique: str) -> None:
    """Mask the words in every layer of a clone that reads them."""
    layers = host.cross_attention_layers(patched, technique)
    host.replace_attention(patched, "attn2", layers, lambda previous: MaskedWords(inside, previous))
