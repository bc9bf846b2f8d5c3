"""A gradient for queries and keys that the host norms and rotates (RMSNorm, then rope) by one operation without any."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

METHOD = "compute_qkv"  # of the host's attention: (x, context, rope_emb, ...) -> query, key and value


def rotated(tensor: Tensor, rope: Tensor) -> Tensor:
    """Channel i of a head's first half turned with channel i of its second half by the 2 x 2 matrix of their place.

    tensor (B, T, H, D), rope (1 or B, T, 1, D / 2, 2, 2), the host's -> (B, T, H, D) in tensor's dtype.
    """
    halves = tensor.to(rope.dtype).unflatten(-1, (2, -1))
    turned = torch.einsum("...dij,...jd->...id", rope, halves)
    return turned.flatten(-2).type_as(tensor)


class ByAnother(torch.autograd.Function):
    """A value with the gradient of another tensor that is equal to it but for rounding."""

    @staticmethod
    def forward(context: Any, value: Tensor, other: Tensor) -> Tensor:
        """value as it is."""
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """None to the value, all of it to the other."""
        return None, gradient


@dataclass(frozen=True)
class RotatedWithGradient:
    """An attention's METHOD: the host's numbers, bit for bit, and where a gradient is wanted, the one they have.

    Without rope the host norms by an operation with a gradient; what it turns to is then rotated here.
    """

    own: Callable

    def __call__(
        self, x: Tensor, context: Tensor | None = None, rope_emb: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if rope_emb is None or not torch.is_grad_enabled():
            return self.own(x, context, rope_emb=rope_emb, **more)
        with torch.no_grad():
            query, key, _ = self.own(x, context, rope_emb=rope_emb, **more)
        *level, value = self.own(x, context, rope_emb=None, **more)
        turned = (rotated(tensor, rope_emb) for tensor in level)
        return *map(ByAnother.apply, (query, key), turned), value


def install_on(patched: Any, names: Iterable[str], attention: str) -> None:
    """Give the attention of that name in some blocks of a MODEL, by their names in its network, its gradient.

    A version of the host whose attention has no METHOD rotates by other means and is left as it is.
    """
    for name in names:
        key = f"{name}.{attention}"
        if hasattr(patched.model.diffusion_model.get_submodule(key), METHOD):
            key = f"diffusion_model.{key}.{METHOD}"
            patched.add_object_patch(key, RotatedWithGradient(patched.get_model_object(key)))
