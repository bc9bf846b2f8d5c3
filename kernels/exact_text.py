"""Exact text in pictures, AnyText (arXiv:2311.03054): where lines stand, and what a text encoder is told of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


def token_embedding(
    neck: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None
) -> Tensor:
    """xi(neck) = LayerNorm(W vec(neck) + b): the embedding of one token per line.      arXiv:2311.03054, section 3.3

    neck (L, N, C) of the recogniser, columns first; weight (D, N C), the others (D,) -> (L, D). It takes the place of
    the placeholder's embedding in the text encoder's table, before the position is added. Without norm_weight: the
    linear map alone, which is what the published AnyText v1.1 has.
    """
    if neck.ndim != 3 or weight.shape[1:] != (neck.shape[1] * neck.shape[2],):
        raise ValueError(f"token_embedding: {tuple(neck.shape)} and a weight {tuple(weight.shape)} do not fit")
    embedded = F.linear(neck.flatten(1), weight, bias)
    return embedded if norm_weight is None else F.layer_norm(embedded, norm_weight.shape, norm_weight, norm_bias)


# ---- where a line stands --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rectangle:
    """A rectangle that a line of text fills: its centre (x, y) and sides in pixels, and the direction of its width.

    angle: of the width, in degrees of (-90, 90], counterclockwise as seen; y grows downwards. 0 is level.
    """

    centre: tuple[float, float]
    angle: float
    width: float
    height: float

    @property
    def axes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Unit vectors (x, y) along the width and down the height."""
        by = math.radians(self.angle)
        return (math.cos(by), -math.sin(by)), (math.sin(by), math.cos(by))

    def is_steep(self, limit: float) -> bool:
        """Whether its width is the longer side and within `limit` degrees of the vertical."""
        return self.width > self.height and 90.0 - abs(self.angle) < limit

    def standing(self) -> Rectangle:
        """The same place with its sides swapped, so that what is written in it downwards stands upright."""
        angle = self.angle - 90.0 if self.angle > 0 else self.angle + 90.0
        return Rectangle(self.centre, angle, width=self.height, height=self.width)

    def grown(self, pixels: float) -> Rectangle:
        """With more on every side; less below 0, but never nothing."""
        return replace(self, width=max(1.0, self.width + 2 * pixels), height=max(1.0, self.height + 2 * pixels))

    def part(self, across: tuple[float, float], down: tuple[float, float]) -> Tensor:
        """The corners (4, 2) of a part of it, from and to where in pixels from its left and its upper side."""
        along, below = (torch.tensor(axis) for axis in self.axes)
        start = torch.tensor(self.centre) - along * self.width / 2 - below * self.height / 2
        corners = ((across[0], down[0]), (across[1], down[0]), (across[1], down[1]), (across[0], down[1]))
        return torch.stack([start + along * x + below * y for x, y in corners])

    def scaled(self, right: float, down: float) -> Rectangle:
        """In a picture of another size. A turned one keeps its angle, which is exact where both factors are equal."""
        by = (abs(right * self.axes[0][0]), abs(down * self.axes[0][1]))
        wide = math.hypot(*by)
        high = math.hypot(right * self.axes[1][0], down * self.axes[1][1])
        centre = (self.centre[0] * right, self.centre[1] * down)
        return replace(self, centre=centre, width=self.width * wide, height=self.height * high)


def convex_hull(points: Tensor) -> Tensor:
    """The corners of the smallest convex polygon around points (n, 2), by Andrew's monotone chain: (m, 2), m <= n."""
    ordered = sorted(set(map(tuple, points.double().tolist())))
    if len(ordered) < 3:
        return torch.tensor(ordered, dtype=torch.float32)

    def chain(found: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        kept: list[tuple[float, float]] = []
        for point in found:
            while len(kept) > 1 and turn(kept[-2], kept[-1], point) <= 0:
                kept.pop()
            kept.append(point)
        return kept[:-1]

    return torch.tensor(chain(ordered) + chain(ordered[::-1]), dtype=torch.float32)


def turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Twice the signed area of a triangle."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def least_rectangle(hull: Tensor) -> Rectangle:
    """The rectangle of least area around a convex polygon (m, 2), m >= 3, its longer side as the width.

    One of its sides lies on an edge of the polygon (Freeman and Shapira, 1975). Of equal areas the one nearest to the
    axes.
    """
    if hull.ndim != 2 or hull.shape[0] < 3 or hull.shape[1] != 2:
        raise ValueError(f"least_rectangle: need the corners (m, 2) of a polygon, m >= 3, got {tuple(hull.shape)}")
    corners = hull.double()
    edges = corners.roll(-1, 0) - corners
    along = edges / edges.norm(dim=1, keepdim=True)  # (m, 2)
    across = torch.stack([-along[:, 1], along[:, 0]], 1)
    u, v = corners @ along.T, corners @ across.T  # (corner, edge)
    spans = torch.stack([u.amax(0) - u.amin(0), v.amax(0) - v.amin(0)], 1)
    slant = torch.minimum(along.abs()[:, 0], along.abs()[:, 1])
    best = int((spans.prod(1) + 1e-6 * slant).argmin())
    middle = (u.amax(0) + u.amin(0))[best] / 2 * along[best] + (v.amax(0) + v.amin(0))[best] / 2 * across[best]
    width, height = spans[best].tolist()
    side = along[best] if width >= height else across[best]
    angle = math.degrees(math.atan2(-float(side[1]), float(side[0])))
    angle = round(angle, 6) % 180.0
    return Rectangle(
        centre=(float(middle[0]), float(middle[1])),
        angle=angle - 180.0 if angle > 90.0 else angle,
        width=max(width, height),
        height=min(width, height),
    )


def reading_order(centres: Tensor, size: tuple[int, int], *, rows_first: bool = True, bands: int = 5) -> list[int]:
    """Indices of places in the order in which they are read: by bands of a fifth of the picture, AnyText's rule.

    centres (n, 2), x and y; size (H, W). rows_first: from above downwards, in a band from left to right; else from left
    to right, in a band from above downwards. AnyText's bands are 102 of 512 pixels; ties go by the exact place.
    """
    down, right = centres[:, 1].tolist(), centres[:, 0].tolist()
    first, second = (down, right) if rows_first else (right, down)
    one, other = size if rows_first else size[::-1]

    def key(index: int) -> tuple[int, int, float, float]:
        a, b = first[index], second[index]
        return int(a * bands // one), int(b * bands // other), a, b

    return sorted(range(len(centres)), key=key)


def rectified(picture: Tensor, place: Rectangle) -> Tensor:
    """What stands in a rectangle, turned so that its width lies level: (C, H, W) -> (C, height, width).

    Bilinear, one sample a pixel; beyond the picture its edge goes on.
    """
    across, down = max(1, round(place.width)), max(1, round(place.height))
    height, width = picture.shape[1:]
    along, below = (torch.tensor(axis) for axis in place.axes)
    u = ((torch.arange(across) + 0.5) / across - 0.5) * place.width
    v = ((torch.arange(down) + 0.5) / down - 0.5) * place.height
    at = torch.tensor(place.centre) + u[None, :, None] * along + v[:, None, None] * below  # (down, across, 2)
    grid = at * 2.0 / torch.tensor([width, height]) - 1.0
    found = F.grid_sample(
        picture[None].float(),
        grid[None].float().to(picture.device),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return found[0]


# ---- how near a reading comes ---------------------------------------------------------------------------------------


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: how many letters to put in, take out or replace until a is b."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def similarity(read: str, wanted: str) -> float:
    """NED = 1 - distance / the longer length: 1 where they are the same, 0 where nothing is. Two empty texts are 1.

    The convention of AnyText's table 1 (arXiv:2311.03054), where more is better.
    """
    return 1.0 - edit_distance(read, wanted) / max(len(read), len(wanted), 1)
