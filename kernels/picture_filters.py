"""Which pictures are fit to be trained on: their size and shape, and whether they were there before."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .conditioning_pictures import greyscale

SIDE = 8  # bits along either side of a hash


def aspect(height: int, width: int) -> float:
    """The longer side over the shorter, 1 and more."""
    return max(height, width) / min(height, width)


def difference_hash(picture: Tensor) -> Tensor:
    """A picture (H, W, 3) in 0..1 as 64 bits (64,): b_yx = g_y,x+1 > g_yx, g its luma in 8 x 9 equal areas.

    The "dHash" of N. Krawetz (Kind of Like That, hackerfactor.com, 2013). Another size, brightness, contrast or
    compression changes few bits; another picture about 32. A mirrored or cropped one counts as another. Ours: less
    than 1 / 512 is no difference, so that flat areas do not come from rounding.
    """
    small = F.interpolate(greyscale(picture.float())[None, None, ..., 0], size=(SIDE, SIDE + 1), mode="area")[0, 0]
    return (small[:, 1:] - small[:, :-1] > 1 / 512).flatten()


def differing_bits(bits: Tensor, others: Tensor) -> Tensor:
    """Hamming distances (n,) of a hash (64,) to n others (n, 64)."""
    return (bits != others).sum(-1)
