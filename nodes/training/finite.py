"""When a training meets numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class NotANumber(ArithmeticError):
    """A loss, its gradient or a measurement is not finite: the weights before are to be kept."""


def nan_error(where: str, look_at: str) -> ValueError:
    """The error for a model that gives NaN `where` ("for this picture"), and what else but the precision to look at."""
    return ValueError(
        f"the model returns NaN {where}: run it in another precision (start ComfyUI with --bf16-unet or "
        f"--fp32-unet), or look at {look_at}."
    )


def require_finite(step: int, size: float, losses: Tensor, fault: ValueError | None = None) -> None:
    """Raise where the size of step `step`'s gradient or a loss is no number.

    fault: the error for a step before which nothing was learned, so that it is the model's own; else NotANumber.
    """
    if math.isfinite(size) and torch.isfinite(losses).all():
        return
    raise fault or NotANumber(f"the loss was no number at step {step + 1}")


class GoodWeights:
    """The values with which some tensors last gave a finite loss, to go back to."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors, self.values = tensors, [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def keep(self) -> None:
        """The tensors as they are gave a finite loss."""
        for value, tensor in zip(self.values, self.tensors, strict=True):
            value.copy_(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back."""
        for value, tensor in zip(self.values, self.tensors, strict=True):
            tensor.copy_(value)
