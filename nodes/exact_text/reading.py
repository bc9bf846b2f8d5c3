"""Read Text: what stands in places of a picture, how sure that is, and how near it comes to what was wanted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.exact_text import Rectangle, rectified, similarity
from ...kernels.text_recognition import Reading, best_path, prepared
from .. import host
from ..settings import Settings
from . import drawing, places
from .building import texts_of
from .fonts import BUILT_IN, Font
from .lines import TextLine, TextLines
from .recogniser import alphabet, shipped_recogniser

EXACTLY, ANY_CASE, LETTERS_ONLY = "exactly", "capitals do not count", "capitals and spaces do not count"
COMPARE = {
    EXACTLY: lambda text: text,
    ANY_CASE: str.casefold,
    LETTERS_ONLY: lambda text: "".join(text.casefold().split()),
}
MARGIN = 0.25  # of the letters' height; tests/exact_text/benchmark.py compares others, and what is drawn may drift
WIDEST = 2560  # pixels of a prepared line: more than 200 letters
# The reader's alphabet has Latin letters and digits in full width as well, which it takes for those of turned lines.
HALF_WIDTH = {0xFEE0 + code: code for code in range(0x21, 0x7F) if chr(code).isalnum()}


@dataclass(frozen=True)
class ReadSettings(Settings):
    """What is compared with what; see PalimpsestReadText."""

    wanted: str = ""
    compare: str = EXACTLY
    order: str = places.DOWN
    grow: int = 0


@dataclass(frozen=True, eq=False)
class Read:
    """What was read in one place of one picture; wanted and the rest are None where nothing was wanted."""

    text: str
    confidence: float
    wanted: str | None = None
    exact: bool | None = None
    ned: float | None = None


# ---- where ----------------------------------------------------------------------------------------------------------


def lines_to_read(
    size: tuple[int, int], text_lines: TextLines | None, mask: Tensor | None, boxes: Any, order: str
) -> list[TextLine]:
    """The places of a picture (H, W), from whichever says them; the whole picture where nothing does."""
    given = [name for name, each in (("text_lines", text_lines), ("mask", mask), ("bboxes", boxes)) if each is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} all say where text stands: leave one of them connected.")
    if text_lines is not None:
        factors = torch.tensor([size[1] / text_lines.size[1], size[0] / text_lines.size[0]])
        lines = [around_letters(line, text_lines.glyphs) for line in text_lines.lines]
        return [replace(line, polygon=line.polygon * factors) for line in lines]
    if mask is not None:
        found = places.places_of_mask(mask, size)
    elif boxes is not None:
        found = places.places_of_boxes(boxes, size)
    else:
        found = [places.placed(torch.ones(size, dtype=torch.bool))]
    return [line_at(place) for place in places.ordered(found, order, size)]


def line_at(place: places.Place) -> TextLine:
    """A place whose text is not known."""
    return TextLine("", place.polygon, places.rectangle(place, places.BY_PLACE)[1])


def rectangle(line: TextLine) -> Rectangle:
    """The rectangle that is read of a line's place, upright where that is steep."""
    place = places.least(line.polygon)
    return place.standing() if place.is_steep(places.STEEP) else place


def around_letters(line: TextLine, drawn: Tensor, share: float = MARGIN) -> TextLine:
    """A line whose place is no larger than its drawn letters (1, 2H, 2W) and a share of their height around them.

    A place may be much higher than its line, and a line that fills a third of what is read is hardly read at all.
    """
    place = rectangle(line)
    ink = rectified(drawn, place.scaled(drawing.TWICE, drawing.TWICE))[0] > 0.5
    if not ink.any():
        return line
    (top, bottom), (left, right) = extent(ink.any(1)), extent(ink.any(0))
    margin = share * min(bottom - top, right - left) / drawing.TWICE
    return replace(
        line, polygon=place.part(ends(left, right, place.width, margin), ends(top, bottom, place.height, margin))
    )


def extent(any_ink: Tensor) -> tuple[int, int]:
    """From where to where some of (n,) are set."""
    found = any_ink.nonzero()[:, 0]
    return int(found[0]), int(found[-1]) + 1


def ends(first: int, last: int, side: float, margin: float) -> tuple[float, float]:
    """The part of a side that holds some of its pixels, which are doubled, and a margin."""
    return max(0.0, first / drawing.TWICE - margin), min(side, last / drawing.TWICE + margin)


def crop(picture: Tensor, line: TextLine, grow: int) -> Tensor:
    """What stands in a line's place, level or upright: (H, W, 3) -> (3, h, w)."""
    return rectified(picture.movedim(-1, 0), rectangle(line).grown(grow))


# ---- what -----------------------------------------------------------------------------------------------------------


def read_line(piece: Tensor) -> Reading:
    """What stands in a crop (3, h, w); letters and digits of full width as the ordinary ones."""
    with torch.no_grad():
        found = best_path(shipped_recogniser()(prepared(piece, most=WIDEST)[None])[0], alphabet())
    return Reading(found.text.translate(HALF_WIDTH), found.confidence)


def read(
    picture: Tensor, lines: Sequence[TextLine], wanted: Sequence[str] | None, settings: ReadSettings
) -> list[Read]:
    """What stands in the places of one picture (H, W, 3)."""
    found = []
    for number, line in enumerate(lines):
        host.stop_if_cancelled()
        reading = read_line(crop(picture, line, settings.grow))
        found.append(compared(reading, wanted[number] if wanted else None, settings.compare))
    return found


def compared(reading: Reading, wanted: str | None, compare: str) -> Read:
    """A reading beside what was wanted."""
    if wanted is None:
        return Read(reading.text, reading.confidence)
    a, b = COMPARE[compare](reading.text), COMPARE[compare](wanted)
    return Read(reading.text, reading.confidence, wanted, a == b, similarity(a, b))


def wanted_texts(settings: ReadSettings, text_lines: TextLines | None, count: int) -> list[str] | None:
    """What should be read: the lines typed here, else those of Text Lines. Raises ValueError for another number."""
    if settings.wanted.strip():
        found = texts_of(settings.wanted)
    elif text_lines is not None:
        found = [line.text for line in text_lines.lines]
    else:
        return None
    if len(found) != count:
        raise ValueError(
            f"wanted has {len(found)} lines and there are {count} places to read: write one line for each place."
        )
    return found


# ---- what is said about it ------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers; nan of none."""
    return sum(values) / len(values) if values else math.nan


def figures(pictures: Sequence[Sequence[Read]]) -> dict[str, float]:
    """The means over every place of every picture; nan for what was not compared."""
    every = [each for found in pictures for each in found]
    return {
        "confidence": mean([each.confidence for each in every]),
        "exact": mean([float(each.exact) for each in every if each.exact is not None]),
        "ned": mean([each.ned for each in every if each.ned is not None]),
    }


def report(pictures: Sequence[Sequence[Read]]) -> str:
    """What was read, place by place, and the figures where something was wanted."""
    told = []
    for number, found in enumerate(pictures, 1):
        start = f"picture {number}: " if len(pictures) > 1 else ""
        told.append(start + ", ".join(in_words(each) for each in found))
    numbers = figures(pictures)
    if not math.isnan(numbers["exact"]):
        told.append(f"exact {numbers['exact']:.0%}, NED {numbers['ned']:.3f} (1 is the same)")
    return "; ".join(told) + "."


def in_words(found: Read) -> str:
    """One place: what was read, and what was wanted where that is another."""
    missed = f" for {found.wanted!r}" if found.exact is False else ""
    return f"{found.text!r}{missed} ({found.confidence:.0%} sure)"


def as_json(pictures: Sequence[Sequence[Read]]) -> str:
    """Every reading of every picture, and the means; null for what was not compared."""
    means = {name: None if math.isnan(value) else round(value, 4) for name, value in figures(pictures).items()}
    readings = [[each.__dict__ for each in found] for found in pictures]
    return json.dumps({"means": means, "pictures": readings}, ensure_ascii=False)


def shown(pictures: Tensor, lines: Sequence[TextLine], found: Sequence[Sequence[Read]]) -> Tensor:
    """The pictures (B, H, W, 3) with every place outlined, and what was read in it."""
    return torch.stack(
        [
            drawing.outlined(picture, lines, [plate(each) for each in read])
            for picture, read in zip(pictures, found, strict=True)
        ]
    )


def plate(found: Read) -> str:
    """What a place's plate says: the reading, or its number of letters where the built-in font has not all of them."""
    mark = {None: "", True: " =", False: " !"}[found.exact]
    fits = not found.text or not Font.of(BUILT_IN).missing(found.text)
    return (found.text if fits else f"{len(found.text)} letters") + mark
