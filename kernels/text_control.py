"""Text at a place in a picture: the auxiliary latent module of AnyText (arXiv:2311.03054) and what goes into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLYPH_CELL, POSITION_CELL = 16, 8  # pixels of a side of each map in one cell of the latent
MASKED_CHANNELS = 4
GLYPH_CHANNELS, POSITION_CHANNELS = GLYPH_CELL**2, POSITION_CELL**2
HINT_CHANNELS = GLYPH_CHANNELS + POSITION_CHANNELS + MASKED_CHANNELS
GLYPH_LAYERS = ((1, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1),
                (96, 256, 2))  # fmt: skip
POSITION_LAYERS = ((1, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2))
GREY = 0.5  # what stands where text is to be written: 0 of a picture in -1..1


def packed(glyphs: Tensor, positions: Tensor, masked: Tensor) -> Tensor:
    """Two maps and a latent as one tensor of the latent's size, each cell holding its pixels of the maps as channels.

    glyphs g (B or 1, 1, 16h, 16w), positions p (B or 1, 1, 8h, 8w), masked z (B, 4, h, w) -> (B, 256 + 64 + 4, h, w).
    So that whatever moves, repeats or casts the hint of a ControlNet does it to all three. Raises ValueError on sizes
    that do not meet.
    """
    height, width = masked.shape[-2:]
    for name, found, cell in (("glyphs", glyphs, GLYPH_CELL), ("positions", positions, POSITION_CELL)):
        if tuple(found.shape[-2:]) != (cell * height, cell * width):
            raise ValueError(
                f"{name} of {found.shape[-1]} x {found.shape[-2]} do not meet a latent of {width} x {height}: "
                f"{cell * width} x {cell * height} are needed"
            )
    maps = [F.pixel_unshuffle(glyphs, GLYPH_CELL), F.pixel_unshuffle(positions, POSITION_CELL)]
    return torch.cat([*(found.to(masked).expand(len(masked), -1, -1, -1) for found in maps), masked], 1)


def unpacked(hint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(glyphs, positions, masked) of what `packed` gave: (B, 324, h, w) -> (B, 1, 16h, 16w), (B, 1, 8h, 8w), z."""
    glyphs, positions, masked = hint.split((GLYPH_CHANNELS, POSITION_CHANNELS, MASKED_CHANNELS), 1)
    return F.pixel_shuffle(glyphs, GLYPH_CELL), F.pixel_shuffle(positions, POSITION_CELL), masked


def fitted(glyphs: Tensor, positions: Tensor, masked: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The three for a latent of another (height, width); for their own they are what they were.

    Thin strokes are averaged where they shrink (area); a place stays black or white; a latent is interpolated.
    """
    if tuple(masked.shape[-2:]) == tuple(size):
        return glyphs, positions, masked
    height, width = size
    return (
        F.interpolate(glyphs, size=(GLYPH_CELL * height, GLYPH_CELL * width), mode="area"),
        F.interpolate(positions, size=(POSITION_CELL * height, POSITION_CELL * width), mode="nearest-exact"),
        F.interpolate(masked, size=(height, width), mode="bilinear"),
    )


def blanked(picture: Tensor, where: Tensor) -> Tensor:
    """picture (1 - where) + grey where: a picture whose text is taken out.            arXiv:2311.03054, section 3.2

    In -1..1, where grey is 0, this is the authors' picture (1 - where). picture (B, 3, H, W) in 0..1, where
    (B or 1, 1, H, W) in 0..1 -> picture's shape.
    """
    return picture * (1 - where) + GREY * where


class AuxiliaryLatent(nn.Module):
    """z_a = fuse(G(glyphs) + P(positions) + masked latent), "+" being concatenation.     arXiv:2311.03054, eq. 2

    G and P are stacks of 3 x 3 convolutions and SiLU with stride 2 where a map is halved; their names are those of the
    authors' checkpoints (glyph_block, position_block, fuse_block). It stands where a ControlNet has its hint block, and
    as there the result is added once, behind the first convolution. convolution: the class to build with.
    """

    def __init__(self, channels: int, convolution: Callable[..., nn.Module] = nn.Conv2d, **made: Any):
        super().__init__()
        self.glyph_block = stack(GLYPH_LAYERS, convolution, **made)
        self.position_block = stack(POSITION_LAYERS, convolution, **made)
        inputs = GLYPH_LAYERS[-1][1] + POSITION_LAYERS[-1][1] + MASKED_CHANNELS
        self.fuse_block = convolution(inputs, channels, 3, padding=1, **made)

    def forward(self, hint: Tensor, *_: Any) -> Tensor:
        """hint as `packed` gives it (B, 324, h, w); what a ControlNet gives beside it is not read -> (B, C, h, w)."""
        glyphs, positions, masked = unpacked(hint)
        return self.fuse_block(torch.cat([self.glyph_block(glyphs), self.position_block(positions), masked], 1))


def stack(layers: Sequence[tuple[int, int, int]], convolution: Callable[..., nn.Module], **made: Any) -> nn.Sequential:
    """3 x 3 convolutions (inputs, outputs, stride), SiLU behind each."""
    found = []
    for inputs, outputs, stride in layers:
        found += [convolution(inputs, outputs, 3, padding=1, stride=stride, **made), nn.SiLU()]
    return nn.Sequential(*found)


def reading_loss(drawn: Tensor, wanted: Tensor, level: Tensor) -> Tensor:
    """abar_t |f(x_0 hat) - f(x_0)|^2 of each line, averaged over its features.        arXiv:2311.03054, section 3.4

    f: what a recogniser's neck says of a line's strip; abar_t = 1 / (1 + sigma^2) in the host's variables, so that
    lines count less the noisier they are. drawn, wanted (L, T, C), level sigma (L,) -> (L,) in float32.
    """
    apart = (drawn.float() - wanted.float()).pow(2).flatten(1).mean(1)
    return apart / (1.0 + level.float() ** 2)
