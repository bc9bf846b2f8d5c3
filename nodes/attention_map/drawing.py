"""Heat maps over pictures, each with its word written on."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.attention_map import heat_colours
from .. import plots
from .reading import Reading

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue


def drawn(reading: Reading, picture: Tensor | None, opacity: float, label: bool) -> Tensor:
    """IMAGE (B * W, H, W, 3): every word's map over every picture, picture by picture, each with its word written on.

    picture (1 or B, H, W, 3 or more); None draws the maps alone. Raises ValueError for another batch.
    """
    pictures, words = reading.shown.shape[:2]
    heat = heat_colours(reading.shown)
    if picture is not None:
        heat = torch.lerp(grey(picture, pictures)[:, None].expand_as(heat), heat, opacity)
    rows = heat.flatten(0, 1).clamp(0, 1)
    if not label:
        return rows
    return torch.stack([plots.labelled(row, reading.words[i % words]) for i, row in enumerate(rows)])


def grey(picture: Tensor, pictures: int) -> Tensor:
    """(1 or B, H, W, 1) an IMAGE without its colours. Raises ValueError for another batch."""
    if len(picture) not in (1, pictures):
        raise ValueError(
            f"the image has {len(picture)} pictures, the record has {pictures}: connect the pictures that were "
            "sampled, or a single one."
        )
    return (picture[..., :3].cpu().float() @ torch.tensor(LUMA))[..., None]
