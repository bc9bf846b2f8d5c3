"""Who reads the instructions of a training: a text encoder, or (head.py) an edit head on a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..training.prompts import Prompts
from .examples import Example


class Reads(Protocol):
    """What makes the prompts of examples."""

    def batch(self, examples: Sequence[Example], told: Sequence[bool], device: Any) -> tuple[Tensor, Tensor | None]:
        """(tokens (B, L, C), pooled (B, P) or None) of examples, of those that are not told their text of none."""


@dataclass(frozen=True, eq=False)
class TextReader:
    """The checkpoint's text encoders, of the instructions."""

    prompts: Prompts

    def batch(self, examples: Sequence[Example], told: Sequence[bool], device: Any) -> tuple[Tensor, Tensor | None]:
        texts = [example.instruction if tell else "" for example, tell in zip(examples, told, strict=True)]
        return self.prompts.batch(texts, device)
