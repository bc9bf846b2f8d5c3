"""What finds the parts of a picture that its caption names: a detector, masks, or boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ....kernels.conditioning_pictures import Box, box_around
from ...quoting import quoted
from .open_detection import Detector
from .text import positions_of, spots_of

HEADS = "head. face."  # what is searched for in people
NOWHERE = (0, 0, 0, 0)  # the box of an empty mask, which is counted as too small
FARTHEST = 1e9  # pixels; a box may lie partly outside of its picture


@dataclass(frozen=True, eq=False)
class Found:
    """A part of a picture that characters start..end of the caption name; mask (H, W): the crop is black elsewhere."""

    start: int
    end: int
    box: Box
    score: float = 1.0
    mask: Tensor | None = None


class Finder(Protocol):
    """Finds what a caption names in a picture, (H, W, 3) in 0..1."""

    def check(self, captions: Sequence[str]) -> None:
        """Raise ValueError that names the first picture whose caption or words do not fit, before any is looked at."""

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]: ...


def in_pixels(box: Sequence[float], picture: Tensor) -> Box:
    """A box in 0..1 in whole pixels of a picture."""
    height, width = picture.shape[:2]
    left, top, right, bottom = box
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


@dataclass(frozen=True)
class ByDetector:
    """What a GroundingDINO finds; of a picture with words of its own (words[i]), only what belongs to one of them."""

    detector: Detector
    box_threshold: float = 0.35
    text_threshold: float = 0.25
    words: Sequence[Sequence[str]] = ()

    def check(self, captions: Sequence[str]) -> None:
        """Raise ValueError for a caption that the detector cannot read whole, and a word that is named too often."""
        for index, caption in enumerate(captions):
            with naming(index):
                self.detector.read(caption)
                self.wanted(index, caption)

    def wanted(self, index: int, caption: str) -> list[tuple[int, int]]:
        """The characters of a caption that are to be found."""
        words = self.words[index] if self.words else ()
        here = [word for word in words if spots_of(word, caption)]
        return positions_of(here, caption) if words else [(0, len(caption))]

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]:
        found = self.detector.detect(picture, caption, self.box_threshold, self.text_threshold)
        wanted = self.wanted(index, caption)
        return [
            Found(each.start, each.end, in_pixels(each.box, picture), each.score)
            for each in found
            if any(each.start < end and start < each.end for start, end in wanted)
        ]

    def heads(self, picture: Tensor) -> list[tuple[Box, float]]:
        """Heads and faces anywhere in a picture, best first."""
        found = self.detector.detect(picture, HEADS, self.box_threshold, self.text_threshold)
        return [(in_pixels(each.box, picture), each.score) for each in found]


@dataclass(frozen=True, eq=False)
class ByMask:
    """What masks show: masks[i] (n, h, w) for the n words of picture i, in their order."""

    masks: Sequence[Tensor]
    words: Sequence[Sequence[str]]
    remove: bool = False

    def check(self, captions: Sequence[str]) -> None:
        """Raise ValueError for another number of words than of masks, and a word that is not in its caption."""
        for index, caption in enumerate(captions):
            self.positions(index, caption)

    def positions(self, index: int, caption: str) -> list[tuple[int, int]]:
        """Where the words of a picture stand in its caption."""
        with naming(index):
            same_number("masks", self.masks[index].shape[:-2].numel(), self.words[index])
            return positions_of(self.words[index], caption)

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]:
        positions = self.positions(index, caption)
        masks = self.masks[index].reshape(-1, *self.masks[index].shape[-2:]).to(picture)
        large = F.interpolate(masks[:, None].clamp(0, 1), picture.shape[:2], mode="bilinear")[:, 0]
        boxes = [box_around(mask) or NOWHERE for mask in large]
        return [
            Found(*position, box, 1.0, mask if self.remove else None)
            for position, box, mask in zip(positions, boxes, large, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class ByBox:
    """What boxes show: boxes[i], as BOUNDING_BOX carries them, for the words of picture i or by their own labels.

    A picture without boxes has no crop, whatever its words: a detector has found nothing in it.
    """

    boxes: Sequence[Sequence[dict]]
    words: Sequence[Sequence[str]]

    def check(self, captions: Sequence[str]) -> None:
        """Raise ValueError for odd boxes, another number of words than of them, and a word not in its caption."""
        for index, caption in enumerate(captions):
            self.placed(index, caption)

    def placed(self, index: int, caption: str) -> list[tuple[tuple[int, int], Boxed]]:
        """The boxes of a picture, each with where its word stands in the caption."""
        boxes = [
            read_box(box, f"box {number} of picture {index + 1}") for number, box in enumerate(self.boxes[index], 1)
        ]
        if not boxes:
            return []
        words = self.words[index] or [box.label for box in boxes]
        with naming(index):
            same_number("boxes", len(boxes), words)
            return list(zip(positions_of(words, caption), boxes, strict=True))

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]:
        height, width = picture.shape[:2]
        return [Found(*position, box.within(height, width), box.score) for position, box in self.placed(index, caption)]


@dataclass(frozen=True)
class Boxed:
    """A box as BOUNDING_BOX carries it, in pixels."""

    x: float
    y: float
    width: float
    height: float
    score: float = 1.0
    label: str = ""

    def within(self, height: int, width: int) -> Box:
        """(left, top, right, bottom) of the part of it that lies in a picture of this size."""
        left, top = max(0, round(self.x)), max(0, round(self.y))
        return left, top, min(width, round(self.x + self.width)), min(height, round(self.y + self.height))


def read_box(box: dict, where: str) -> Boxed:
    """A box as another node gives it. Raises ValueError for one that has no place, or names that are no text."""
    found = {name: number_of(box.get(name), f"{name} of {where}") for name in ("x", "y", "width", "height")}
    label = box.get("label")
    if not isinstance(label, str | None):
        raise ValueError(f"label of {where} is {quoted(label)}: boxes are named by words of the caption.")
    score = number_of(box.get("score", 1.0), f"score of {where}")
    return Boxed(**found, score=score, label=label or "")


def number_of(value: Any, what: str) -> float:
    """A number of a box. Raises ValueError for what is none, NaN, and places that are in no picture."""
    found = value.item() if isinstance(value, Tensor | np.generic) and value.shape == () else value
    known = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    if not known or abs(found) > FARTHEST:
        raise ValueError(f"{what} is {quoted(value)}, a number is needed: look at the node that makes the boxes.")
    return found


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Within, an error says of which picture it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"picture {index + 1}: {error}") from error


def same_number(what: str, count: int, words: Sequence[str]) -> None:
    """Raise ValueError where a picture has another number of words than of masks or boxes."""
    if count != len(words):
        named = quoted(", ".join(words)) if words else "none"
        raise ValueError(
            f"it has {count} {what} and {len(words)} words ({named}): give a word of the caption for each, separated "
            "by commas, in the same order."
        )
