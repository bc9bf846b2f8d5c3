"""What a dataset's lines and its recipe say, value by value: of its kind and within bounds, else a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from ...foreign import json_line
from ...picture_files import MIN_SIDE, MOST_PIXELS
from ...quoting import quoted
from ...said import MOST_LETTERS, Said
from .dataset import RANGES, Crop, Recipe, Record
from .text import moved

# ----------------------------------------------------------------------------------------------------------- a record


def record_of(line: str) -> Record:
    """A record of one line. Raises ValueError that says what of it cannot be read."""
    said = Said.of(json_line(line))
    picture, caption, size = said.file("picture"), said.text("caption"), size_of(said)
    given = enumerate(said.parts("crops", list), 1)
    crops = tuple(crop_of(Said.of(each, f"crop {number}"), size) for number, each in given)
    drawn = Said(said.parts("wholes", dict), "'wholes'")
    record = Record(picture, caption, size, crops, {kind: drawn.file(kind) for kind in drawn.values})
    return replace(record, crops=tuple(sorted(placed(record), key=lambda crop: crop.start)))


def size_of(said: Said) -> tuple[int, int]:
    """Width and height of a picture, of MIN_SIDE and more a side, and MOST_PIXELS at most."""
    width, height = size = said.wholes("size", 2)
    if min(size) < MIN_SIDE or width * height > MOST_PIXELS:
        raise said.refuse("size", f"a size from {MIN_SIDE} x {MIN_SIDE} to {MOST_PIXELS / 1e6:.1f} megapixels")
    return size


def crop_of(said: Said, size: tuple[int, int]) -> Crop:
    """A crop of a picture of a size."""
    left, top, right, bottom = box = said.wholes("box", 4)
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise said.refuse("box", f"a part (left, top, right, bottom) of {size[0]} x {size[1]} pixels")
    return Crop(
        word=said.text("word"),
        start=said.whole("start", 0, MOST_LETTERS),
        end=said.whole("end", 1, MOST_LETTERS),
        box=box,
        score=said.number("score", -1e6, 1e6),
        file=said.file("file"),
        person=said.flag("person"),
        head=None if said.values.get("head") is None else said.file("head"),
    )


def placed(record: Record) -> Iterator[Crop]:
    """The crops where their words stand in the caption, which may have been edited after they were found."""
    for crop in record.crops:
        if record.caption[crop.start : crop.end] == crop.word:
            yield crop
            continue
        taken = [(c.start, c.end) for c in record.crops if record.caption[c.start : c.end] == c.word]
        start, end = moved(crop.word, record.caption, taken)
        yield replace(crop, word=record.caption[start:end], start=start, end=end)


# ---------------------------------------------------------------------------------------------------------- the recipe


def recipe_of(value: Any) -> Recipe:
    """The recipe of a dataset's header. Raises ValueError for another name, kind, or a number out of its range."""
    said, known = Said.of(value, "the recipe"), {each.name: each for each in fields(Recipe)}
    odd = next((name for name in said.values if name not in known), None)
    if odd is not None:
        raise ValueError(f"the recipe has {quoted(odd)}, it knows {', '.join(known)}")
    ask = {name: said.whole if isinstance(each.default, int) else said.number for name, each in known.items()}
    return Recipe(**{name: ask[name](name, *RANGES[name]) for name in said.values})
