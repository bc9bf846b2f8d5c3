"""What finds the parts of a picture that its caption names: a detector, masks, or boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from ....kernels.conditioning_pictures import Box, box_around
from .open_detection import Detector, positions_of

HEADS = "head. face."  # what is searched for in people


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

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]: ...


def in_pixels(box: Sequence[float], picture: Tensor) -> Box:
    """A box in 0..1 in whole pixels of a picture."""
    height, width = picture.shape[:2]
    left, top, right, bottom = box
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


@dataclass(frozen=True)
class ByDetector:
    """What a GroundingDINO finds; with words, only what belongs to one of them."""

    detector: Detector
    box_threshold: float = 0.35
    text_threshold: float = 0.25
    words: tuple[str, ...] = ()

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]:
        found = self.detector.detect(picture, caption, self.box_threshold, self.text_threshold)
        here = [word for word in self.words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE)]
        wanted = positions_of(here, caption) if self.words else [(0, len(caption))]
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

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]:
        masks, words = self.masks[index].reshape(-1, *self.masks[index].shape[-2:]), self.words[index]
        same_number(index, "masks", len(masks), words)
        large = F.interpolate(masks[:, None].float().clamp(0, 1), picture.shape[:2], mode="bilinear")[:, 0]
        boxes = [box_around(mask) for mask in large]
        return [
            Found(*position, box, 1.0, mask if self.remove else None)
            for position, box, mask in zip(positions_of(words, caption), boxes, large, strict=True)
            if box is not None
        ]


@dataclass(frozen=True, eq=False)
class ByBox:
    """What boxes show: boxes[i], as BOUNDING_BOX carries them, for the words of picture i or by their own labels."""

    boxes: Sequence[Sequence[dict]]
    words: Sequence[Sequence[str]]

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]:
        boxes = self.boxes[index]
        words = self.words[index] or [str(box.get("label", "")) for box in boxes]
        same_number(index, "boxes", len(boxes), words)
        height, width = picture.shape[:2]
        found = []
        for position, box in zip(positions_of(words, caption), boxes, strict=True):
            left, top = max(0, round(box["x"])), max(0, round(box["y"]))
            right, bottom = min(width, round(box["x"] + box["width"])), min(height, round(box["y"] + box["height"]))
            found.append(Found(*position, (left, top, right, bottom), float(box.get("score", 1.0))))
        return found


def same_number(index: int, what: str, count: int, words: Sequence[str]) -> None:
    """Raise ValueError where a picture has another number of words than of masks or boxes."""
    if count != len(words):
        raise ValueError(
            f"picture {index + 1} has {count} {what} and {len(words)} words ({', '.join(words) or 'none'}): give a "
            "word of the caption for each, separated by commas, in the same order."
        )
