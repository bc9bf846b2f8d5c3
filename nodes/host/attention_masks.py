"""What an attention masks its keys by, in any of the forms that the host takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def in_four(mask: Tensor) -> Tensor:
    """A mask (B, H, N, M), (B, N, M) or (N, M) as (B, H, N, M), each of B and H possibly 1."""
    while mask.ndim < 4:
        mask = mask[None] if mask.ndim == 2 else mask[:, None]
    return mask


def part_of_mask(mask: Tensor, rows: slice, queries: Tensor | slice, keys: Tensor | slice) -> Tensor:
    """A mask (B, H, N, M), (B, N, M) or (N, M), each of B, H and N possibly 1, for some rows, queries and keys of it.

    The host takes it in these forms; here it comes out as (B, H, N, M).
    """
    mask = in_four(mask)
    mask = mask if mask.shape[0] == 1 else mask[rows]
    mask = mask if mask.shape[2] == 1 else mask[:, :, queries]
    return mask[..., keys]


def as_bias(mask: Tensor | None, key: Tensor) -> Tensor:
    """What a mask (of any of the host's forms) adds to the scores of key (R, H, M, D), as (B, H, N, M)."""
    if mask is None:
        return key.new_zeros(1, 1, 1, key.shape[2])
    mask = in_four(mask)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=key.dtype).masked_fill(~mask, -math.inf)
    return mask.expand(*mask.shape[:3], key.shape[2])


def longer_mask(mask: Tensor | None, key: Tensor, more: int, bias: Tensor | None) -> Tensor:
    """A mask (of any of the host's forms) for `more` keys after those of key (R, H, M, D) -> (B, H, N, M + more).

    bias (R or 1, more) is added to the scores of the new keys; without it all see them.
    """
    mask = as_bias(mask, key)
    rows = mask.shape[0] if bias is None else max(len(bias), mask.shape[0])
    added = mask.new_zeros(1, more) if bias is None else bias.to(mask)
    added = added[:, None, None].expand(rows, *mask.shape[1:3], more)
    return torch.cat([mask.expand(rows, *mask.shape[1:]), added], 3)
