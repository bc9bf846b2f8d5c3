"""Lines of text drawn: where they stand in a picture, by themselves for the recogniser, and for people to see.

Sizes are AnyText's (arXiv:2311.03054 and its authors' code): an em of 0.8 of the short side, lines that would be longer
than their place at 0.85 of its length (0.75 downwards), letters spread over it where there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ...kernels.exact_text import Rectangle
from .. import plots
from .fonts import Font, pieces
from .lines import STRIP, TextLine

TWICE = 2  # glyphs are drawn at twice the picture
FULL, LONGEST, LONGEST_DOWN = 0.8, 0.85, 0.75  # of a place's length: what is spread, and what is too long otherwise
STRIP_FILL, STRIP_SIZE = 0.9, 50
LEAST_EM = 4  # pixels
FRAMES = ((230, 60, 40), (66, 120, 190), (70, 150, 80), (200, 140, 30), (150, 80, 180))


@dataclass(frozen=True)
class Style:
    """How lines are written: the font, an em's share of the short side, and how far letters are spread, 0 to 1."""

    font: Font
    size: float = 0.8
    spacing: float = 1.0


@dataclass(frozen=True, eq=False)
class Written:
    """One line as a picture of its own, a mask (h, w) with its centre at the line's, and its em in pixels."""

    picture: Image.Image
    em: int


# ---- one line -------------------------------------------------------------------------------------------------------


def written_level(text: str, place: Rectangle, style: Style) -> Written:
    """A line from left to right, in a rectangle by its width and height."""
    em = max(LEAST_EM, round(style.size * place.height))
    natural = length(text, style.font.at(em))
    if natural > LONGEST * place.width:
        em = max(LEAST_EM, int(em * LONGEST * place.width / natural))
        natural = length(text, style.font.at(em))
    parts = pieces(text)
    gap = spread(FULL * place.width - natural, len(parts), style.spacing)
    font, margin = style.font.at(em), em // 2 + 4
    size = (round(max(natural + gap * (len(parts) - 1), place.width)) + 2 * margin, round(place.height) + 2 * margin)
    image = Image.new("L", size)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = font.getbbox(text)
    wide = right - left + gap * (len(parts) - 1)
    at = ((size[0] - wide) / 2 - left, (size[1] - (bottom - top)) / 2 - top)
    if gap == 0:
        pen.text(at, text, fill=255, font=font)
    else:
        for number, part in enumerate(parts):
            before = font.getlength("".join(parts[:number]))
            pen.text((at[0] + before + number * gap, at[1]), part, fill=255, font=font)
    return Written(image, em)


def written_down(text: str, place: Rectangle, style: Style) -> Written:
    """A line downwards, letter below letter, each upright, in a rectangle by its width and height."""
    parts = list(text) if len(pieces(text)) == 1 else pieces(text)
    count = len(parts)
    em = max(LEAST_EM, round(style.size * place.width))
    if count * em > LONGEST_DOWN * place.height:
        em = max(LEAST_EM, int(LONGEST_DOWN * place.height / count))
    pitch = em + spread(FULL * place.height - count * em, count, style.spacing)
    font, margin = style.font.at(em), em // 2 + 4
    size = (round(place.width) + 2 * margin, round(max(place.height, count * pitch)) + 2 * margin)
    image = Image.new("L", size)
    pen = ImageDraw.Draw(image)
    for number, letter in enumerate(parts):
        y = size[1] / 2 + (number - (count - 1) / 2) * pitch
        pen.text((size[0] / 2, y), letter, fill=255, font=font, anchor="mm")
    return Written(image, em)


def length(text: str, font) -> float:
    """How wide the ink of a text is."""
    left, _, right, _ = font.getbbox(text)
    return right - left


def spread(room: float, letters: int, spacing: float) -> float:
    """How far two letters are moved apart, so that a share of the free room is used up."""
    return spacing * max(0.0, room) / (letters - 1) if letters > 1 else 0.0


# ---- all lines of a picture -----------------------------------------------------------------------------------------


def glyphs(lines: Sequence[tuple[str, Rectangle, bool]], size: tuple[int, int], style: Style) -> tuple[Tensor, list]:
    """(text, place, downwards) of each line drawn at twice a picture of (H, W): (1, 2H, 2W) of 0 and 1; ems in pixels.

    Black and white, as AnyText's maps are, by a threshold where its authors' code dithers.
    """
    canvas = Image.new("L", (TWICE * size[1], TWICE * size[0]))
    ems = []
    for text, place, down in lines:
        twice = place.scaled(TWICE, TWICE)
        line = (written_down if down else written_level)(text, twice, style)
        turned = line.picture
        if place.angle:
            turned = turned.rotate(place.angle, resample=Image.Resampling.BICUBIC, expand=True)
        corner = [round(c - side / 2) for c, side in zip(twice.centre, turned.size, strict=True)]
        canvas.paste(255, tuple(corner), turned)
        ems.append(line.em / TWICE)
    return torch.from_numpy(np.array(canvas) > 127).float()[None], ems


def strip(text: str, font: Font) -> Tensor:
    """A line by itself as the recogniser reads it: (80, 512) of 0 and 1, 0.9 of it filled, centred."""
    high, wide = STRIP
    left, top, right, bottom = font.at(STRIP_SIZE).getbbox(text)
    share = STRIP_FILL * min(wide / max(1, right - left), high / max(1, bottom - top))
    drawn = font.at(int(STRIP_SIZE * share))
    image = Image.new("L", (wide, high))
    left, top, right, bottom = drawn.getbbox(text)
    at = ((wide - (right - left)) / 2 - left, (high - (bottom - top)) / 2 - top)
    ImageDraw.Draw(image).text(at, text, fill=255, font=drawn)
    return torch.from_numpy(np.array(image) > 127).float()


# ---- for people -----------------------------------------------------------------------------------------------------


def preview(pictures: Tensor, drawn: Tensor, lines: Sequence[TextLine]) -> Tensor:
    """Lines over pictures (B, H, W, 3): white letters with a dark edge, and the outline of every place."""
    ink = F.avg_pool2d(drawn[None], TWICE)[0, 0]  # (H, W)
    reach = max(1, round(min(pictures.shape[1:3]) / 200))
    edge = F.max_pool2d(ink[None, None], 2 * reach + 1, 1, reach)[0, 0]
    found = pictures * (1 - edge[..., None]) + 0.08 * edge[..., None]
    found = found * (1 - ink[..., None]) + ink[..., None]
    return torch.stack([outlined(picture, lines) for picture in found])


def outlined(picture: Tensor, lines: Sequence[TextLine], words: Sequence[str] | None = None) -> Tensor:
    """A picture (H, W, 3) with the outline of every line's place, and a word at it: its number, where none is given."""
    canvas = plots.Canvas(plots.to_image(picture), letters=max(9, min(picture.shape[:2]) // 26))
    width = max(1, min(picture.shape[:2]) // 256)
    for number, line in enumerate(lines):
        points = [tuple(point) for point in outset(line.polygon, 1.5 * width).tolist()]
        colour = FRAMES[number % len(FRAMES)]
        canvas.line([*points, points[0]], colour, width)
        label(canvas, points, words[number] if words else str(number + 1), colour)
    return plots.to_tensor(canvas.image)


def outset(polygon: Tensor, by: float) -> Tensor:
    """A convex polygon (n, 2) with every corner moved away from its middle, so that its outline lies outside."""
    away = polygon - polygon.mean(0)
    return polygon + away / away.norm(dim=1, keepdim=True).clamp_min(1e-6) * by * 2**0.5


def label(canvas: plots.Canvas, points: Sequence[tuple[float, float]], word: str, colour: plots.Colour) -> None:
    """A word on a plate above the highest point of a place, or below the lowest where there is no room."""
    left, top, right, bottom = canvas.pen.textbbox((0, 0), word or " ", font=canvas.font)
    wide, high = right - left + 6, bottom - top + 4
    lowest, (highest, x) = max(y for _, y in points), min((y, x) for x, y in points)
    x = min(max(0, x), canvas.image.width - wide)
    above, below = highest - high - 1, lowest + 2
    y = above if above >= 0 else min(below, canvas.image.height - high)
    canvas.bar((x, y, x + wide, y + high), colour)
    canvas.pen.text((x + 3 - left, y + 2 - top), word, fill=plots.WHITE, font=canvas.font)
