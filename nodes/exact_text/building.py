"""Text Lines: lines of text, each in its place of a picture, as a network and people are shown them."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.scripts import split_lines
from ..quoting import quoted
from ..settings import Settings
from . import drawing, places
from .fonts import BUILT_IN, Font, require_drawable
from .lines import TextLine, TextLines
from .recogniser import alphabet

TRAINED_LINES, TRAINED_LETTERS = 5, 20  # AnyText's in training
MOST_LETTERS = 200
MOST_SIDE = 4096  # pixels; the glyphs have twice as many


@dataclass(frozen=True)
class LinesSettings(Settings):
    """How lines are placed and written; see PalimpsestTextLines for what each does to the picture."""

    lines: str = "EXACT TEXT"
    font: str = BUILT_IN
    order: str = places.DOWN
    direction: str = places.BY_PLACE
    size: float = 0.8
    spacing: float = 1.0
    width: int = 512
    height: int = 512


@dataclass(frozen=True, eq=False)
class Built:
    """What Text Lines makes: the lines, how large their letters are (an em in pixels), and where places overlap."""

    made: TextLines
    ems: list[float]
    overlaps: list[tuple[int, int]]


def texts_of(lines: str) -> list[str]:
    """The lines that are written: composed letters, single spaces, no empty ones. Raises ValueError for none."""
    found = [" ".join(unicodedata.normalize("NFC", line).split()) for line in split_lines(lines)]
    if not 1 <= len(found) <= places.MOST:
        raise ValueError(f"lines holds {len(found)} lines of text: write 1 to {places.MOST}, one in each row.")
    for number, line in enumerate(found, 1):
        if len(line) > MOST_LETTERS or not line.isprintable():
            why = f"has {len(line)} letters" if line.isprintable() else "holds signs that cannot be drawn"
            raise ValueError(f"line {number}, {quoted(line)}, {why}: write at most {MOST_LETTERS} letters.")
    return found


def build(settings: LinesSettings, size: tuple[int, int], mask: Tensor | None, boxes: Any) -> Built:
    """Lines in their places of a picture of (H, W). Raises ValueError as its parts do."""
    if min(size) < 2 * places.LEAST or max(size) > MOST_SIDE:
        raise ValueError(
            f"the picture has {size[1]} x {size[0]} pixels, text is drawn into sides of {2 * places.LEAST} to "
            f"{MOST_SIDE}: resize it."
        )
    texts, font = texts_of(settings.lines), Font.of(settings.font)
    for text in texts:
        require_drawable(font, text)
    style = drawing.Style(font, settings.size, settings.spacing)
    found = chosen_places(texts, style, size, mask, boxes)
    require_as_many(texts, found, "white parts of the mask" if boxes is None else "boxes")
    found = places.ordered(found, settings.order, size)
    laid = [places.rectangle(place, settings.direction) for place in found]
    glyphs, ems = drawing.glyphs(
        [(text, place, down) for text, (place, down) in zip(texts, laid, strict=True)], size, style
    )
    outlines = [place.polygon if settings.direction == places.BY_PLACE else place.box for place in found]
    lines = [TextLine(text, outline, down) for text, outline, (_, down) in zip(texts, outlines, laid, strict=True)]
    filled = torch.stack([place.filled for place in found])
    strips = torch.stack([drawing.strip(text, font) for text in texts])
    made = TextLines(tuple(lines), glyphs, filled.amax(0)[None], strips, size)
    return Built(made, ems, overlapping(filled))


def chosen_places(
    texts: Sequence[str], style: drawing.Style, size: tuple[int, int], mask: Tensor | None, boxes: Any
) -> list[places.Place]:
    """The places that a mask or boxes say, or rows down the middle of the picture."""
    if mask is not None and boxes is not None:
        raise ValueError("mask and bboxes both say where the lines go: disconnect one of them.")
    if mask is not None:
        return places.places_of_mask(mask, size)
    if boxes is not None:
        return places.places_of_boxes(boxes, size)
    font = style.font.at(100)
    return places.rows([lengths(drawing.length(text, font) / 100, style) for text in texts], size)


def lengths(ems: float, style: drawing.Style) -> float:
    """How long a row is for a text of so many ems, in its heights: the text fills drawing.FULL of it."""
    return max(1.0, ems * style.size / drawing.FULL)


def require_as_many(texts: Sequence[str], found: Sequence[places.Place], what: str) -> None:
    """Raise ValueError where there are not as many places as lines."""
    if len(texts) != len(found):
        middles = ", ".join(f"({x:.0f}, {y:.0f})" for x, y in (place.centre.tolist() for place in found[:6]))
        raise ValueError(
            f"there are {len(texts)} lines of text and {len(found)} {what} (around {middles}): give one for each line, "
            "apart from one another, or write another number of lines."
        )


def overlapping(filled: Tensor) -> list[tuple[int, int]]:
    """Numbers of lines whose places (L, H, W) share pixels, counted from 1."""
    pairs = itertools.combinations(range(len(filled)), 2)
    return [(a + 1, b + 1) for a, b in pairs if bool((filled[a] * filled[b]).any())]


# ---- what is said about it ------------------------------------------------------------------------------------------


def report(built: Built, settings: LinesSettings) -> str:
    """What stands where, and what AnyText was not trained for."""
    told = [
        f"{number}: {line.text!r} around ({line.polygon[:, 0].mean():.0f}, {line.polygon[:, 1].mean():.0f})"
        f"{', downwards' if line.vertical else ''}, letters of {em:.0f} pixels"
        for number, (line, em) in enumerate(zip(built.made.lines, built.ems, strict=True), 1)
    ]
    return "; ".join([*told, f"font {settings.font}", *remarks(built)]) + "."


def remarks(built: Built) -> list[str]:
    """What a user should know of these lines."""
    lines, (height, width) = built.made.lines, built.made.size
    found = [f"the places of lines {a} and {b} overlap: their letters may run together" for a, b in built.overlaps]
    if len(lines) > TRAINED_LINES:
        found.append(f"{len(lines)} lines are more than the {TRAINED_LINES} of AnyText's training")
    long = [str(number) for number, line in enumerate(lines, 1) if len(line.text) > TRAINED_LETTERS]
    if long:
        found.append(
            f"line {', '.join(long)} has more than the {TRAINED_LETTERS} letters that AnyText was trained with"
        )
    unread = sorted({letter for line in lines for letter in line.text} - set(alphabet()) - {" "})
    if unread:
        found.append(
            f"the reader has no letter {', '.join(map(repr, unread))}: the network is told of it by looks alone"
        )
    if height % 8 or width % 8:
        found.append(f"{width} x {height} is no multiple of 8, as latents are: the VAE cuts the picture")
    return found
