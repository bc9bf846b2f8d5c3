"""Pictures that stand in a prompt while training: which crops are kept, and how they are varied (MUMU).

arXiv:2406.18790, sections 4 and 5. Pictures are (H, W, 3) in 0..1; boxes are (left, top, right, bottom) in pixels, the
last two not included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]


# ---- boxes ----------------------------------------------------------------------------------------------------------


def area(box: Box) -> int:
    """Pixels in a box; 0 where it is turned inside out."""
    left, top, right, bottom = box
    return max(right - left, 0) * max(bottom - top, 0)


def worth_showing(box: Box, height: int, width: int, min_side: int, max_share: float) -> bool:
    """Whether a crop is neither too small nor nearly the picture itself.

    "We filtered out crops with total area less than 150x150 pixels or larger than 75% of the image."   section 4
    """
    return min_side**2 <= area(box) <= max_share * height * width and area(box) > 0


def inside(box: Box, other: Box) -> float:
    """Share of a box that lies in another one, 0 to 1."""
    shared = (max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3]))
    return area(shared) / max(area(box), 1)


def box_around(mask: Tensor) -> Box | None:
    """The smallest box around a mask (H, W), where it is 0.5 or more; None for an empty one."""
    columns, rows = ((mask >= 0.5).any(axis).nonzero()[:, 0] for axis in (0, 1))
    if len(rows) == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def crop(picture: Tensor, box: Box) -> Tensor:
    """What is in a box."""
    left, top, right, bottom = box
    return picture[top:bottom, left:right]


# ---- variations -----------------------------------------------------------------------------------------------------


def random_crop(picture: Tensor, generator: torch.Generator, min_share: float = 0.7) -> Tensor:
    """A part of the picture, at least `min_share` of each side, at a random place."""
    shares = min_share + (1.0 - min_share) * torch.rand(2, generator=generator)
    sides = []
    for size, share in zip(picture.shape[:2], shares.tolist(), strict=True):
        kept = max(1, round(size * share))
        first = int(torch.randint(size - kept + 1, (), generator=generator))
        sides.append(slice(first, first + kept))
    return picture[sides[0], sides[1]]


def flip(picture: Tensor, generator: torch.Generator) -> Tensor:
    """The picture, left and right exchanged."""
    return picture.flip(1)


def gaussian_noise(picture: Tensor, generator: torch.Generator, strength: float = 0.1) -> Tensor:
    """The picture with noise of this standard deviation."""
    return (picture + strength * torch.randn(picture.shape, generator=generator)).clamp(0, 1)


def greyscale(picture: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The picture without its colours, by the luma of ITU-R BT.601."""
    return (picture @ picture.new_tensor([0.299, 0.587, 0.114]))[..., None].expand_as(picture).contiguous()


VARIATIONS: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (random_crop, flip, gaussian_noise, greyscale)


def varied(picture: Tensor, generator: torch.Generator) -> Tensor:
    """The picture under one of the four variations of section 5, each as likely; how they mix is not said."""
    return VARIATIONS[int(torch.randint(len(VARIATIONS), (), generator=generator))](picture, generator)


# ---- the whole picture without its looks ----------------------------------------------------------------------------


def blurred(grey: Tensor, sigma: float) -> Tensor:
    """(H, W) under a Gaussian of this standard deviation in pixels; the border is repeated."""
    reach = max(1, min(round(3 * sigma), min(grey.shape) - 1))
    at = torch.arange(-reach, reach + 1, dtype=grey.dtype)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(grey[None, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[0, 0]


def sketch(picture: Tensor, sigma: float = 3.0) -> Tensor:
    """A drawing in grey strokes on black: what is darker than its surroundings, s = 1 - g / blur(g), at full range.

    The division ("colour dodge") is the old darkroom trick for pencil drawings. The paper draws with PiDiNet, a trained
    network; this needs no weights.
    """
    grey = greyscale(picture)[..., 0]
    strokes = (1.0 - grey / blurred(grey, sigma).clamp(min=1e-3)).clamp(min=0)
    return (strokes / strokes.amax().clamp(min=1e-3))[..., None].expand_as(picture).contiguous()
