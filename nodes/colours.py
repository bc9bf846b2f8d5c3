"""Pictures as other nodes give them: their shape, their channels, their numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def rgb(image: Tensor, what: str) -> Tensor:
    """An IMAGE (B, H, W, C) in colours, (B, H, W, 3): of one channel they are equal, a fourth is left out.

    The fourth is how opaque pixels are, which the host's own nodes leave out as well. It shares the input's memory.
    Raises ValueError that names `what` for another form, no pixels, and NaN.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        form = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{what} has the form {form}: connect pictures of 1 (grey), 3 (RGB) or 4 (RGBA) channels.")
    colours = image[..., :3]
    if image.numel() == 0 or not all(torch.isfinite(row).all() for row in colours):
        raise ValueError(f"{what} is empty or holds NaN: connect a picture that decoded well.")
    return colours.expand(*image.shape[:3], 3)
