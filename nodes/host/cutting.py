"""What the host's VAE cuts off a picture: it encodes the middle of one whose sides are no multiples of its cells."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .model import Grid

CELL = 8  # pixels of a picture's side in a cell of the latent, in every U-Net's VAE and most transformers'
CELLS = (8, 16, 32, 64)  # in any model's; 16 in FLUX.2's and Wan 2.2 5B's


def cell_of(size: Grid, latent: Grid) -> int | None:
    """Pixels of a side in a cell of the latent (height, width) that shows a picture; None where it shows another."""
    return next((cell for cell in CELLS if tuple(side // cell for side in size) == tuple(latent)), None)


def middle(size: Grid, part: Grid) -> tuple[slice, slice]:
    """Rows and columns of a picture of (height, width) that its part in the middle takes, where the host cuts it."""
    starts = [(side - length) // 2 for side, length in zip(size, part, strict=True)]
    return tuple(slice(start, start + length) for start, length in zip(starts, part, strict=True))


def as_encoded(mask: Tensor, latent: Grid) -> Tensor:
    """The part of a MASK (..., H, W) of a picture that a model's latent of (height, width) shows.

    A mask of another size than that picture's is taken for the whole latent's.
    """
    size = tuple(mask.shape[-2:])
    cell = cell_of(size, latent)
    if cell is None:
        return mask
    rows, columns = middle(size, tuple(cell * side for side in latent))
    return mask[..., rows, columns]


def beyond(picture: Tensor, size: Grid) -> Tensor:
    """The middle (..., h, w) of a picture of (height, width), its border repeated over what was cut off."""
    (rows, columns), (height, width) = middle(size, tuple(picture.shape[-2:])), size
    sides = (columns.start, width - columns.stop, rows.start, height - rows.stop)
    flat = picture.reshape(1, -1, *picture.shape[-2:])
    return F.pad(flat, sides, mode="replicate").reshape(*picture.shape[:-2], *size)


def was_cut(source: Tensor, edited: Tensor) -> bool:
    """Whether an edit (h, w, C) shows the middle of its source (H, W, C), as the host's VAE cuts it.

    Its size must be the one that is left, and its edges lie nearer to the middle's than to those of the whole source,
    resized: brightness' steps are compared, which no tint has.
    """
    size, part = tuple(source.shape[:2]), tuple(edited.shape[:2])
    if size == part or all(part != tuple(side // cell * cell for side in size) for cell in CELLS):
        return False
    whole, edit = source[..., :3].float().mean(-1), edited[..., :3].float().mean(-1)
    small = F.interpolate(whole[None, None], size=part, mode="bicubic", antialias=True)[0, 0]
    return steps_apart(whole[middle(size, part)], edit) <= steps_apart(small, edit)


def steps_apart(picture: Tensor, other: Tensor) -> float:
    """The mean difference between the steps from pixel to pixel of two pictures (h, w)."""
    apart = picture - other.to(picture)
    return float(sum(apart.diff(dim=side).abs().sum() for side in (0, 1)) / apart.numel())
