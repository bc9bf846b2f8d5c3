"""Masks of pictures on the grids of the latent and of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .frames import Frames


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
