"""A way of editing that is ready for a picture's edits, as the benchmark of rivals runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prepared:
    """A method that is ready for a picture's edits.

    draw: CONDITIONING of the edit -> latent; rebuild: () -> latent; kept: bytes of all pictures. inverted: whether it
    edits from the inverted picture.
    """

    draw: Callable[[list], torch.Tensor]
    rebuild: Callable[[], torch.Tensor]
    kept: int
    inverted: bool = True


def size(*tensors: torch.Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
