"""Compositing an edit into its source: weights of a mask, and the mixture itself.

Pictures are (H, W, C), masks and weights (H, W) in 0..1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scipy import ndimage

if TYPE_CHECKING:
    from torch import Tensor


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Grow a soft mask by a disc: the largest value within `radius` pixels, (H, W) -> (H, W).

    D(p) = max m(p + q) over q with |q|^2 <= r^2, as rows of the disc whose maxima come from windows of doubling width;
    about 4 r comparisons a pixel. Beyond the border lies nothing.
    """
    height, width = mask.shape
    table = F.pad(mask, (radius,) * 4, value=-math.inf)
    window, grown = 1, torch.full_like(mask, -math.inf)
    for row in range(radius, -1, -1):
        half = math.isqrt(radius * radius - row * row)
        while 2 * window <= 2 * half + 1:
            table = torch.maximum(table[:, :-window], table[:, window:])
            window *= 2
        left, right = radius - half, radius + half - window + 1
        widest = torch.maximum(table[:, left : left + width], table[:, right : right + width])
        for top in {radius - row, radius + row}:
            torch.maximum(grown, widest[top : top + height], out=grown)
    return grown


def grow(mask: Tensor, pixels: int) -> Tensor:
    """dilate for positive `pixels`; for negative ones the white shrinks, -D(-m), but not from the picture's border."""
    return dilate(mask, pixels) if pixels >= 0 else -dilate(-mask, -pixels)


def distance_to_outside(mask: Tensor) -> Tensor:
    """Euclidean distance in pixels from each pixel to the nearest one where the mask is 0; infinite if there is none.

    (H, W) -> (H, W) float32 on the mask's device; exact (scipy.ndimage.distance_transform_edt, on the CPU).
    """
    inside = mask > 0
    if bool(inside.all()):
        return torch.full(mask.shape, math.inf, device=mask.device)
    return torch.from_numpy(ndimage.distance_transform_edt(inside.cpu().numpy())).to(mask.device, torch.float32)


def feather_ramp(distance: Tensor, width: float) -> Tensor:
    """Weight of the edit at a distance d in pixels from the outside: 0 at d = 0 and 1 beyond `width`.

    t = min(d / (width + 1), 1),  w = 3 t^2 - 2 t^3
    the cubic Hermite step, level at both ends. A width of 0 gives 1 to every pixel that is not outside (d >= 1).
    """
    share = (distance / (width + 1)).clamp(0, 1)
    return share * share * (3 - 2 * share)


def mix(source: Tensor, edited: Tensor, weights: Tensor) -> Tensor:
    """s + w (e - s); where w = 0 the source and where w = 1 the edit, bit for bit. (H, W, C), weights (H, W)."""
    w = weights[..., None]
    mixed = source + w * (edited - source)
    return torch.where(w == 0, source, torch.where(w == 1, edited, mixed))
