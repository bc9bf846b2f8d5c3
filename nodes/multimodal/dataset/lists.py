"""What the host gives as lists: one picture, text, batch of masks or list of boxes for each picture of a dataset."""

from __future__ import annotations

from typing import Any

import torch

from ...colours import rgb
from ...host.cancelling import Cancellable
from ...quoting import quoted
from .finders import ByBox, ByDetector, ByMask
from .pictures import require_pixels
from .text import cleaned, comma, lines


def one_by_one(images: list, what: str = "images") -> list[torch.Tensor]:
    """Pictures (H, W, 3) of a list of batches: the host's own memory. Raises ValueError for none, and for NaN.

    One channel stands for all three, a fourth is left out. Stopped where the run is cancelled.
    """
    with Cancellable():
        pictures = [picture for batch in images for picture in rgb(batch, what)]
    if not pictures:
        raise ValueError(f"{what} has no pictures: look at the node that makes them.")
    for number, picture in enumerate(pictures, 1):
        require_pixels(picture.shape[1], picture.shape[0], f"picture {number} of {what}")
    return pictures


def captions_for_each(captions: list[str], pictures: int) -> list[str]:
    """A caption for each picture: a list of as many, or the lines of one. Raises ValueError for another number."""
    found = list(captions)
    if len(found) == 1 and pictures != 1:
        found = lines(found[0])
    found = [" ".join(cleaned(text).split()) for text in found]
    if len(found) != pictures or not all(found):
        filled = sum(map(bool, found))
        raise ValueError(
            f"captions has {filled} texts for {pictures} pictures: give a line or an entry for each picture, in their "
            "order, none of them empty."
        )
    return found


def words_for_each(words: list[str], pictures: int) -> list[tuple[str, ...]]:
    """The words of each picture: one text for all, or a text or line for each. Raises ValueError for another number."""
    if len(words) == 1:
        each = lines(words[0]) or [""]
        words = each if len(each) > 1 else each * pictures
    if len(words) != pictures:
        raise ValueError(f"words has {len(words)} texts for {pictures} pictures: give one for all, or one for each.")
    return [comma(text) for text in words]


def depth_for_each(depth: list | None, pictures: int) -> list[torch.Tensor]:
    """The depth map of each picture, or none at all. Raises ValueError for another number."""
    depths = one_by_one(depth, "depth") if depth else []
    if depths and len(depths) != pictures:
        raise ValueError(f"depth has {len(depths)} pictures for {pictures}: give one for each, or disconnect it.")
    return depths


def scores_for_each(scores: list | None, pictures: int) -> list[float]:
    """The score of each picture, or none at all. Raises ValueError for another number."""
    found = [float(score) for score in scores or ()]
    if found and len(found) != pictures:
        raise ValueError(
            f"scores has {len(found)} numbers for {pictures} pictures: give one for each, in their order, or "
            "disconnect it."
        )
    return found


def masks_for_each(masks: list[torch.Tensor], pictures: int, what: str = "masks") -> list[torch.Tensor]:
    """A batch of masks for each picture; a single batch of as many masks as there are pictures is taken apart."""
    if not all(mask.numel() and torch.isfinite(mask).all() for mask in masks):
        raise ValueError(f"{what} has one that is empty or holds NaN: look at the node that makes it.")
    if len(masks) == 1 and pictures != 1 and len(masks[0]) == pictures:
        masks = [*masks[0][:, None]]
    return require_number(masks, pictures, what)


def boxes_for_each(boxes: list, pictures: int) -> list[list[dict]]:
    """A list of boxes for each picture; a single list of as many entries as there are pictures is taken apart."""
    if len(boxes) == 1 and pictures != 1 and isinstance(boxes[0], list) and len(boxes[0]) == pictures:
        boxes = boxes[0]
    return [flat(each) for each in require_number(boxes, pictures, "boxes")]


def require_number(entries: list, pictures: int, what: str) -> list:
    """The entries. Raises ValueError where they are not one for each picture."""
    if len(entries) != pictures:
        raise ValueError(
            f"{what} has entries for {len(entries)} pictures, there are {pictures}: give one entry for each picture."
        )
    return entries


def flat(boxes: dict | list, levels: int = 4) -> list[dict]:
    """Boxes without the lists that some nodes put around those of a frame; one may come by itself.

    Raises ValueError for what is neither, and for lists in more than so many levels.
    """
    if isinstance(boxes, dict):
        return [boxes]
    if not isinstance(boxes, list | tuple) or levels == 0:
        raise ValueError(
            f"boxes has {quoted(boxes)}, a box is an object of x, y, width and height: look at the node that makes it."
        )
    return [box for each in boxes for box in flat(each, levels - 1)]


def chosen_finder(
    detector: ByDetector | None, words: list[tuple[str, ...]], masks: list | None, boxes: list | None, remove: bool
) -> Any:
    """What finds the crops: masks, boxes, or the detector. Raises ValueError for none of them, or for two.

    words: of each picture. remove: black outside of a mask.
    """
    if masks and boxes:
        raise ValueError("masks and boxes are both connected, and either says where the words are: disconnect one.")
    if masks:
        return ByMask(masks_for_each(masks, len(words)), words, remove)
    if boxes:
        return ByBox(boxes_for_each(boxes, len(words)), words)
    if detector is None:
        raise ValueError(
            "nothing says where the words are: choose a detector (a GroundingDINO folder in "
            "models/palimpsest_detectors), or connect masks or boxes."
        )
    return detector
