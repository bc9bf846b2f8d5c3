"""Masks of pictures on the grids of the latent and of layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .frames import Frames
from .model import Grid

BLACK = 0.5 / 255  # mask values below half a step of an 8-bit picture count as black
UNLIKE = 0.1  # by what share the proportions of a mask and its latent may differ: sides are rounded to cells


def picture_rows(mask: Tensor, pictures: int, height: int, width: int, what: str = "mask") -> Tensor:
    """A MASK as (pictures, 1, height, width) weights in 0..1: any size in, area-averaged, batch 1 or `pictures`.

    Raises ValueError for another batch, NaN, or no pixels.
    """
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    if mask.numel() == 0 or not torch.isfinite(mask).all():
        raise ValueError(f"the {what} is empty or holds NaN: connect a mask with values from 0 to 1.")
    if mask.shape[0] not in (1, pictures):
        raise ValueError(
            f"the {what} has {mask.shape[0]} pictures, the batch has {pictures}: give one mask for all, or one for "
            "each."
        )
    small = torch.nn.functional.interpolate(mask.clamp(0, 1)[:, None], size=(height, width), mode="area")
    return small.expand(pictures, -1, -1, -1)


def rows_of_frames(mask: Tensor, frames: Frames, pictures: int, height: int, width: int) -> Tensor:
    """picture_rows of a MASK (1 or all pictures, h, w) for the `pictures` rows that a prompt has in a model call."""
    if frames.shown is None:
        return picture_rows(mask, pictures, height, width)
    whole = picture_rows(mask, frames.clip if mask.ndim > 2 and len(mask) > 1 else 1, height, width)
    return frames.rows(whole).expand(pictures, -1, -1, -1)


def rows_on(mask: Tensor, x: Tensor) -> Tensor:
    """picture_rows of a MASK on the grid of x (B, C, H, W), or of clips (B, C, F, H, W), whose masks are their frames'.

    (B, 1, H, W); of clips (1, 1, F, H, W), and (B, 1, 1, H, W) where they have one frame.
    """
    size = x.shape[-2:]
    if x.ndim == 5 and x.shape[2] > 1:
        return picture_rows(mask, x.shape[2], *size).movedim(0, 1)[None]
    rows = picture_rows(mask, len(x), *size)
    return rows.unsqueeze(2) if x.ndim == 5 else rows


def masks_of_frames(mask: Tensor, frames: int, ratio: int) -> Tensor:
    """A MASK (B, h, w) of a video's frames, or of those of its latent, as one for each of the latent's (frames, h, w).

    A latent's first frame holds one of the video's, each further one `ratio` of them, whose mean counts. Raises
    ValueError for another number.
    """
    if len(mask) == frames:
        return mask
    if len(mask) != ratio * (frames - 1) + 1:
        raise ValueError(
            f"the mask has {len(mask)} pictures, the video {ratio * (frames - 1) + 1} frames ({frames} in its latent): "
            "give one mask for all, or one for each."
        )
    return torch.cat([mask[:1], mask[1:].unflatten(0, (frames - 1, ratio)).mean(1)])


def one_colour(mask: Tensor) -> str | None:
    """ "black" or "white" where a MASK is that all over; None for one that has a region."""
    if float(mask.max()) < BLACK:
        return "black"
    return "white" if float(mask.min()) > 1 - BLACK else None


def stretched(mask: Tensor, latent: Grid) -> str | None:
    """A sentence where a MASK has other proportions than the latent of (height, width) that it is laid over."""
    size = mask.shape[-2:]
    if abs(math.log(size[0] * latent[1] / (size[1] * latent[0]))) <= UNLIKE:
        return None
    return (
        f"the mask has {size[1]} x {size[0]} pixels and the latent {latent[1]} x {latent[0]} cells, other proportions: "
        "it is stretched over the latent; a tile or crop of a picture needs its own part of the mask"
    )
