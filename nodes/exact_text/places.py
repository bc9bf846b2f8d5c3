"""Where lines stand in a picture: by the parts of a mask, by boxes, or in rows down its middle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy import ndimage
from torch import Tensor

from ...kernels.exact_text import Rectangle, convex_hull, reading_order
from ...kernels.exact_text import least_rectangle as least
from .. import host

DOWN, RIGHT, AS_GIVEN = "top to bottom", "left to right", "as given"
ORDERS = (DOWN, RIGHT, AS_GIVEN)
BY_PLACE, LEVEL, DOWNWARDS = "by the place", "level", "downwards"
DIRECTIONS = (BY_PLACE, LEVEL, DOWNWARDS)
STEEP = 10.0  # degrees from the vertical within which a place is written downwards, AnyText's
LEAST = 8  # pixels of a place's short side: a cell of the latent
SPECK = 4  # pixels a side of what is no place: a slip of the brush
MOST = 64  # places of one picture


@dataclass(frozen=True, eq=False)
class Place:
    """Where one line stands: its outline (n, 2) in pixels, x and y, and its pixels (H, W), 1 inside."""

    polygon: Tensor
    filled: Tensor

    @property
    def centre(self) -> Tensor:
        """The middle of its pixels, x and y."""
        rows, columns = self.filled.nonzero().float().mean(0)
        return torch.stack([columns, rows]) + 0.5

    @property
    def box(self) -> Tensor:
        """The corners (4, 2) of the level box around it."""
        (left, top), (right, bottom) = self.polygon.amin(0).tolist(), self.polygon.amax(0).tolist()
        return torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]])


def outline(filled: Tensor) -> Tensor:
    """The convex outline (m, 2) of the pixels of (H, W) that are set, around their corners."""
    rows = filled.any(1).nonzero()[:, 0]
    inside = filled[rows].float()
    left, right = inside.argmax(1), filled.shape[1] - inside.flip(1).argmax(1)
    corners = [torch.stack([x, y], 1) for x in (left, right) for y in (rows, rows + 1)]
    return convex_hull(torch.cat(corners))


def placed(filled: Tensor) -> Place:
    """A place of its pixels (H, W)."""
    return Place(outline(filled), filled.float())


# ---- by a mask ------------------------------------------------------------------------------------------------------


def places_of_mask(mask: Tensor, size: tuple[int, int]) -> list[Place]:
    """The connected white parts of one MASK (1, h, w), or one place for each of several; at a picture of (H, W).

    Parts of a few pixels are no places. Raises ValueError where nothing is white, and for hundreds of parts.
    """
    white = host.picture_rows(mask.cpu(), len(mask), *size)[:, 0] > 0.5
    for number, each in enumerate(white, 1):
        if not each.any():
            which = f"number {number} of the masks" if len(white) > 1 else "the mask"
            raise ValueError(f"{which} has no white: paint where the lines of text go.")
    if len(white) > MOST:
        raise ValueError(f"there are {len(white)} masks, one for each line: give at most {MOST}.")
    return [placed(each) for each in white] if len(white) > 1 else parts(white[0])


def parts(white: Tensor) -> list[Place]:
    """The connected parts of (H, W) pixels, corners count as connected."""
    labels, count = ndimage.label(white.numpy(), structure=[[1] * 3] * 3)
    boxes = ndimage.find_objects(labels)
    sizes = [max(side.stop - side.start for side in box) for box in boxes]
    kept = [number for number, size in enumerate(sizes, 1) if size > SPECK]
    if not 1 <= len(kept) <= MOST:
        raise ValueError(
            f"the mask has {count} separate white parts, {len(kept)} of them larger than {SPECK} pixels: paint one "
            f"part for each line of text, at most {MOST}."
        )
    found = torch.from_numpy(labels)
    return [placed(found == number) for number in kept]


# ---- by boxes -------------------------------------------------------------------------------------------------------


def flat(boxes: Any) -> Iterable[Mapping[str, float]]:
    """The boxes in lists within lists, as the host's nodes give them."""
    if isinstance(boxes, Mapping):
        return [boxes]
    return [inner for each in boxes or () for inner in flat(each)]


def places_of_boxes(boxes: Any, size: tuple[int, int]) -> list[Place]:
    """A place for each box of a picture (H, W), cut to it. Raises ValueError for one outside, and for none."""
    found = []
    for number, box in enumerate(flat(boxes), 1):
        left, top = round(box["x"]), round(box["y"])
        right, bottom = round(box["x"] + box["width"]), round(box["y"] + box["height"])
        filled = torch.zeros(size, dtype=torch.bool)
        if right > 0 and bottom > 0:
            filled[max(0, top) : bottom, max(0, left) : right] = True
        if not filled.any():
            raise ValueError(
                f"box {number} ({left}, {top}, {right - left} x {bottom - top}) lies outside of the picture of "
                f"{size[1]} x {size[0]} pixels: move it inside."
            )
        found.append(placed(filled))
    if not 1 <= len(found) <= MOST:
        raise ValueError(f"bboxes holds {len(found)} boxes: give one for each line of text, at most {MOST}.")
    return found


# ---- in rows --------------------------------------------------------------------------------------------------------


def rows(lengths: list[float], size: tuple[int, int]) -> list[Place]:
    """A level place for each line, one below another around the middle; lengths: of the lines, in ems.

    All have the height at which the longest fills 0.9 of the picture's width, at most a fifth of its height.
    """
    height, width = size
    high = min(height / 5, 0.9 * height / len(lengths), 0.9 * width / max(1.0, *lengths))
    pitch = min(1.25 * high, 0.95 * height / len(lengths))
    boxes = []
    for number, ems in enumerate(lengths):
        middle, wide = height / 2 + (number - (len(lengths) - 1) / 2) * pitch, min(0.95 * width, ems * high)
        boxes.append({"x": (width - wide) / 2, "y": middle - high / 2, "width": wide, "height": high})
    return places_of_boxes(boxes, size)


# ---- what is written there ------------------------------------------------------------------------------------------


def ordered(places: list[Place], order: str, size: tuple[int, int]) -> list[Place]:
    """The places in the order of their lines."""
    if order == AS_GIVEN:
        return places
    centres = torch.stack([place.centre for place in places])
    return [places[index] for index in reading_order(centres, size, rows_first=order == DOWN)]


def rectangle(place: Place, direction: str) -> tuple[Rectangle, bool]:
    """The rectangle that a line is written in, and whether downwards. Raises ValueError for one that is too narrow."""
    low, high = place.polygon.amin(0).tolist(), place.polygon.amax(0).tolist()
    middle = ((low[0] + high[0]) / 2, (low[1] + high[1]) / 2)
    upright = Rectangle(middle, 0.0, width=high[0] - low[0], height=high[1] - low[1])
    tight = least(place.polygon)
    found, down = upright, direction == DOWNWARDS
    if direction == BY_PLACE:
        down = tight.is_steep(STEEP)
        found = tight.standing() if down else tight
    if min(found.width, found.height) < LEAST:
        raise ValueError(
            f"a place of {found.width:.0f} x {found.height:.0f} pixels around ({middle[0]:.0f}, {middle[1]:.0f}) is "
            f"too narrow for text: make it at least {LEAST} pixels high and wide, a cell of the latent."
        )
    return found, down
