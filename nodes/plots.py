"""Pictures of numbers and of pictures: the one place that draws.

Places are (x, y) and boxes (left, top, right, bottom), in pixels from the upper left corner. What goes in and comes out
are tensors (H, W, 3) in 0..1, and an IMAGE (1, H, W, 3) where a plot is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
INK, SOFT, GREY = (30, 30, 30), (205, 205, 205), (150, 150, 150)
RED, BLUE, GREEN = (200, 80, 50), (66, 120, 190), (70, 150, 80)
LETTERS = 13  # size of the letters, in pixels


# ---------------------------------------------------------------------------------------------- tensors and pictures


def to_image(picture: Tensor) -> Image.Image:
    """(H, W, 3) in 0..1 as a picture of 8 bits."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """A picture of 8 bits as (H, W, 3) in 0..1, float32."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


@lru_cache
def font_of(size: int) -> ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)


# --------------------------------------------------------------------------------------------------------- the canvas


class Canvas:
    """A picture to draw on, with letters of one size."""

    def __init__(self, image: Image.Image, letters: int = LETTERS):
        self.image, self.pen, self.font = image, ImageDraw.Draw(image), font_of(letters)

    @classmethod
    def blank(cls, width: int, height: int, letters: int = LETTERS) -> Canvas:
        """A white one."""
        return cls(Image.new("RGB", (width, height), WHITE), letters)

    def text(self, at: Point, words: str, colour: Colour = INK, anchor: str = "la") -> None:
        """One line of text; anchor: which of its points lies at `at`, as Pillow says it (la: upper left)."""
        self.pen.text(at, words, fill=colour, font=self.font, anchor=anchor)

    def plate(self, at: Point, words: str) -> None:
        """White text on a black plate."""
        left, top, right, bottom = self.pen.textbbox(at, words, font=self.font)
        self.bar((left - at[0], top - at[1], right + at[0], bottom + at[1]), BLACK)
        self.text(at, words, WHITE)

    def length(self, words: str) -> float:
        """How many pixels wide a text is."""
        return self.pen.textlength(words, font=self.font)

    def line(self, points: Sequence[Point], colour: Colour, width: int = 1) -> None:
        """A line through points; nothing for a single one."""
        if len(points) > 1:
            self.pen.line(list(points), fill=colour, width=width)

    def frame(self, box: Box, colour: Colour = SOFT, width: int = 1) -> None:
        """The edge of a box."""
        self.pen.rectangle(box, outline=colour, width=width)

    def bar(self, box: Box, colour: Colour) -> None:
        """A box filled with a colour."""
        self.pen.rectangle(box, fill=colour)

    def dot(self, at: Point, colour: Colour, radius: int = 3) -> None:
        """A filled circle."""
        x, y = at
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def picture(self, at: tuple[int, int], picture: Tensor, size: tuple[int, int]) -> None:
        """A picture (H, W, 3), resized to (width, height), with its upper left corner at a place."""
        self.image.paste(to_image(picture).resize(size, Image.Resampling.LANCZOS), at)

    def plot(self, axes: Axes, lines: Iterable[Line], dots: bool = False) -> None:
        """Lines over axes, 2 pixels wide; dots: with their points."""
        for line in lines:
            spots = [axes.at(x, y) for x, y in line.points]
            self.line(spots, line.colour, 2)
            for spot in spots if dots else ():
                self.dot(spot, line.colour)

    def done(self) -> Tensor:
        """IMAGE (1, H, W, 3) in 0..1."""
        return to_tensor(self.image)[None]


# ---------------------------------------------------------------------------------------------------------- line plots


@dataclass(frozen=True)
class Line:
    """One line of a plot: name, colour, and its points (x, y)."""

    name: str
    colour: Colour
    points: Sequence[Point]


@dataclass(frozen=True)
class Axes:
    """A box whose x runs from 0 to `last` and whose y from `low` to `high`; values beyond lie on its edge."""

    box: Box
    last: float
    low: float
    high: float

    def at(self, x: float, y: float) -> Point:
        """Where a point lies in the picture."""
        left, top, right, bottom = self.box
        share = min(max((y - self.low) / (self.high - self.low or 1.0), 0.0), 1.0)
        return left + x / self.last * (right - left), bottom - share * (bottom - top)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Running mean over a tenth of the points, the first and last repeated beyond the ends."""
    if len(points) < 3:
        return list(points)
    xs, ys = np.asarray(points, dtype=float).T
    width = max(1, len(ys) // 10)
    padded = np.pad(ys, (width // 2, width - 1 - width // 2), "edge")
    return list(zip(xs.tolist(), np.convolve(padded, np.ones(width) / width, "valid").tolist(), strict=True))


def with_mean(points: Sequence[Point]) -> list[Line]:
    """The lines of a loss: its running mean over the values themselves."""
    return [Line("", SOFT, points), Line("", RED, smoothed(points))]


def by_noise(points: Iterable[tuple[float, float, float]], noise_grows: bool = True) -> list[Line]:
    """Points (x, share, y) as running means over three thirds of the noise levels.

    The share is 0 at no noise and 1 at the most where `noise_grows`, else the other way round.
    """
    points, thirds = list(points), [(0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0)]
    names = (("little noise", BLUE), ("middle", GREEN), ("much noise", RED))
    return [
        Line(name, colour, smoothed([(x, y) for x, share, y in points if low <= share <= high]))
        for (name, colour), (low, high) in zip(names, thirds if noise_grows else thirds[::-1], strict=True)
    ]


@dataclass(frozen=True)
class Panel:
    """One plot of a training, over its steps. around_one: its values are ratios, shown with their dots around 1."""

    title: str
    lines: Sequence[Line]
    around_one: bool = False

    def span(self) -> tuple[float, float]:
        """The lowest and the highest value shown: from 0, without the highest hundredth; or all, and 1."""
        values = [y for line in self.lines for _, y in line.points if np.isfinite(y)] or [1.0]
        if self.around_one:
            return min(1.0, *values) - 0.02, max(1.0, *values) + 0.02
        return 0.0, float(np.quantile(values, 0.99)) * 1.05


PANEL_WIDTH, PANEL_HEIGHT, MARGIN, LABEL = 720, 190, 18, 52


def training(panels: Sequence[Panel], steps: int) -> Tensor:
    """IMAGE (1, H, W, 3): the panels of a training of so many steps, one below the other."""
    canvas = Canvas.blank(PANEL_WIDTH, len(panels) * PANEL_HEIGHT)
    for number, panel in enumerate(panels):
        draw_panel(canvas, number * PANEL_HEIGHT, panel, max(1, steps))
    return canvas.done()


def draw_panel(canvas: Canvas, top: int, panel: Panel, last: int) -> None:
    """One panel below `top`: axes, title, legend and lines, the first line above the others."""
    left, top, right, bottom = LABEL, top + 2 * MARGIN, PANEL_WIDTH - MARGIN, top + PANEL_HEIGHT - MARGIN - 6
    low, high = panel.span()
    axes = Axes((left, top, right, bottom), last, low, high)
    canvas.frame(axes.box)
    canvas.text((left, top - MARGIN), panel.title)
    canvas.text((4, top), f"{high:.3g}")
    canvas.text((4, bottom - 14), f"{low:.3g}")
    canvas.text((right, bottom + 3), f"{last} steps", anchor="ra")
    if panel.around_one:
        canvas.line([axes.at(0, 1.0), axes.at(last, 1.0)], GREY)
    canvas.plot(axes, reversed(panel.lines), dots=panel.around_one)
    for line in reversed(panel.lines):
        if line.name:
            canvas.text((right, top - MARGIN), line.name, line.colour, anchor="ra")
            right -= int(canvas.length(line.name)) + 16


# -------------------------------------------------------------------------------------------------- pictures and words


def labelled(picture: Tensor, words: str) -> Tensor:
    """A picture (H, W, 3) with words in its upper left corner."""
    canvas = Canvas(to_image(picture), letters=max(10, len(picture) // 16))
    canvas.plate((4, 3), words)
    return to_tensor(canvas.image).to(picture.dtype)


def boxed(picture: Tensor, boxes: Iterable[Box], colour: Colour = (230, 60, 40)) -> Tensor:
    """A picture (H, W, 3) with frames around places of it."""
    canvas = Canvas(to_image(picture))
    for box in boxes:
        canvas.frame(box, colour, width=max(1, max(canvas.image.size) // 150))
    return to_tensor(canvas.image)


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a sheet: pictures (H, W, 3) with a word under each, and a line of text below."""

    cells: Sequence[tuple[Tensor, str]]
    text: str


GAP, TEXT_LINE = 6, 17


def sheet(rows: Iterable[Row], side: int = 144, columns: int = 6) -> Tensor:
    """Rows of pictures as one IMAGE (1, H, W, 3); pictures that find no place in `columns` are left out.

    Rows are drawn one by one: where they come from a generator, the pictures of one are in memory at a time.
    """
    width = columns * (side + GAP) + GAP
    drawn = [draw_row(row, side, columns, width) for row in rows]
    return torch.cat(drawn or [Canvas.blank(width, TEXT_LINE).done()], dim=1)


def draw_row(row: Row, side: int, columns: int, width: int) -> Tensor:
    """One row of a sheet, (1, H, width, 3)."""
    letters = max(20, width // 7)
    below = side + 2 * TEXT_LINE  # where the text begins
    canvas = Canvas.blank(width, below + GAP + TEXT_LINE * math.ceil(len(row.text) / letters), letters=12)
    for column, (picture, word) in enumerate(row.cells[:columns]):
        left = GAP + column * (side + GAP)
        canvas.image.paste(thumbnail(to_image(picture), side), (left, GAP))
        canvas.text((left, GAP + side + 1), word[: side // 6], (90, 90, 90))
    for number, start in enumerate(range(0, len(row.text), letters)):
        canvas.text((GAP, below + number * TEXT_LINE), row.text[start : start + letters], (20, 20, 20))
    return canvas.done()


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A picture resized so that its longer side is `side`."""
    small = image.copy()
    small.thumbnail((side, side))
    return small.resize(tuple(max(1, round(length * side / max(image.size))) for length in image.size))
