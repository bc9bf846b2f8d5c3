"""What a context adapter reads in place of a text (arXiv:2402.16627, section 4.3): a class, or a layout of parts.

Both are one map of shares, (B, K, rows, columns), that sums to 1 over its K labels: of a class 1 x 1 and of one label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_colours(picture: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Which colour of a palette each pixel is of, and how far from it: argmin_k |x - p_k|^2, and that |x - p_k|.

    picture (B, H, W, 3), palette (K, 3), both in 0..1 -> (B, H, W) whole numbers, (B, H, W). Of colours at one distance
    the first is taken.
    """
    least = picture.new_full(picture.shape[:-1], torch.inf)
    parts = torch.zeros_like(least, dtype=torch.int64)
    for number, colour in enumerate(palette.to(picture)):
        distance = (picture - colour).pow(2).sum(-1)
        nearer = distance < least
        least, parts = torch.where(nearer, distance, least), torch.where(nearer, number, parts)
    return parts, least.sqrt()


def part_shares(parts: Tensor, labels: int, side: int) -> Tensor:
    """Share of every part in each cell of a grid: the mean of its indicator over the cell's pixels.

    parts (B, H, W), whole numbers from 0 to labels - 1 -> (B, labels, side, side). Where the sides do not divide, cells
    overlap by a pixel (adaptive average pooling).
    """
    return torch.stack([F.adaptive_avg_pool2d((parts == k).float(), side) for k in range(labels)], 1)


def class_map(classes: Tensor, labels: int) -> Tensor:
    """Classes (B,), whole numbers from 0 to labels - 1, as maps of one cell: (B, labels, 1, 1)."""
    return F.one_hot(classes, labels)[..., None, None].float()
