"""Compositing an edit into its source: weights of a mask, and the mixture itself.

Pictures are (H, W, C), masks and weights (H, W) in 0..1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scipy import ndimage

from .pausing import pause

if TYPE_CHECKING:
    from torch import Tensor

BAND = 2**20  # pixels whose distances are found at a time


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Grow a soft mask by a disc: the largest value within `radius` pixels, (H, W) -> (H, W).

    D(p) = max m(p + q) over q with |q|^2 <= r^2, as rows of the disc whose maxima come from windows of doubling width;
    about 4 r comparisons a pixel. Beyond the border lies nothing.
    """
    height, width = mask.shape
    table = F.pad(mask, (radius,) * 4, value=-math.inf)
    window, grown = 1, torch.full_like(mask, -math.inf)
    for row in range(radius, -1, -1):
        pause()
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


def distance_to_outside(mask: Tensor, reach: float = math.inf) -> Tensor:
    """Euclidean distance in pixels from each pixel to the nearest one where the mask is 0; infinite if there is none.

    (H, W) -> (H, W) float32 on the mask's device; exact (scipy.ndimage.distance_transform_edt, on the CPU). Only
    distances up to `reach` need be right, larger ones are at least as large: then a picture is worked on in bands.
    """
    height, width = mask.shape
    margin = math.ceil(min(reach, height))
    band = max(margin, BAND // width, 1)
    found = torch.empty(mask.shape, device=mask.device)
    for top in range(0, height, band):
        pause()
        first = max(0, top - margin)
        inside = mask[first : top + band + margin] > 0
        found[top : top + band] = distances(inside)[top - first :][:band]
    return found


def distances(inside: Tensor) -> Tensor:
    """distance_to_outside of (h, w) bool, in one piece."""
    if bool(inside.all()):
        return torch.full(inside.shape, math.inf, device=inside.device)
    return torch.from_numpy(ndimage.distance_transform_edt(inside.cpu().numpy())).to(inside.device, torch.float32)


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
