"""Exact text in pictures, AnyText (arXiv:2311.03054): where lines stand, and what a text encoder is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def token_embedding(
    neck: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None
) -> Tensor:
    """xi(neck) = LayerNorm(W vec(neck) + b): the embedding of one token per line.      arXiv:2311.03054, section 3.3

    neck (L, N, C) of the recogniser, columns first; weight (D, N C), the others (D,) -> (L, D). It takes the place of
    the placeholder's embedding in the text encoder's table, before the position is added. Without norm_weight: the
    linear map alone, which is what the published AnyText v1.1 has.
    """
    if neck.ndim != 3 or weight.shape[1:] != (neck.shape[1] * neck.shape[2],):
        raise ValueError(f"token_embedding: {tuple(neck.shape)} and a weight {tuple(weight.shape)} do not fit")
    embedded = F.linear(neck.flatten(1), weight, bias)
    return embedded if norm_weight is None else F.layer_norm(embedded, norm_weight.shape, norm_weight, norm_bias)
