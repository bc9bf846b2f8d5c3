"""The course of a context adapter's training as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .fit import History

WIDTH, PANEL, MARGIN, LABEL = 720, 190, 18, 52
INK, SOFT = (30, 30, 30), (205, 205, 205)
RED, BLUE, GREEN, GREY = (200, 80, 50), (66, 120, 190), (70, 150, 80), (150, 150, 150)
BANDS = {"little noise": (0.0, 1 / 3, BLUE), "middle": (1 / 3, 2 / 3, GREEN), "much noise": (2 / 3, 1.0, RED)}


@dataclass(frozen=True)
class Line:
    """One line of a panel: name, colour, and its points (x, y)."""

    name: str
    colour: tuple[int, int, int]
    points: Sequence[tuple[float, float]]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running mean over a tenth of the points."""
    if len(points) < 3:
        return list(points)
    xs, ys = np.asarray(points, dtype=float).T
    width = max(1, len(ys) // 10)
    padded = np.pad(ys, (width // 2, width - 1 - width // 2), "edge")
    return list(zip(xs.tolist(), np.convolve(padded, np.ones(width) / width, "valid").tolist(), strict=True))


def draw(history: History) -> Tensor:
    """IMAGE (1, H, W, 3) in 0..1, three panels: the loss, the loss by noise level, and errors against r = 0."""
    losses = list(enumerate(history.losses, 1))
    bands = [
        Line(name, colour, smoothed([(s + 1, loss) for s, angle, loss in history.points if low <= angle <= high]))
        for name, (low, high, colour) in BANDS.items()
    ]
    checks = [
        Line(name, colour, [(0, 1.0), *((v.step, getattr(v, field)) for v in history.validations)])
        for name, field, colour in (
            ("loss, sees x0", "clean", BLUE), ("loss, sees x0_hat", "predicted", GREEN), ("sampled", "sampled", RED)
        )
    ]  # fmt: skip
    sheet = Image.new("RGB", (WIDTH, 3 * PANEL), "white")
    pen, last = ImageDraw.Draw(sheet), max(1, len(losses))
    panel(pen, 0, "training loss (eq. 6)", [Line("", SOFT, losses), Line("", RED, smoothed(losses))], last, 0.0)
    panel(pen, 1, "by noise level", bands, last, 0.0)
    panel(pen, 2, "error against the plain model (1)", checks, last, None)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def panel(pen: ImageDraw.ImageDraw, number: int, title: str, lines: list[Line], last: int, floor: float | None) -> None:
    """One panel with its title, legend and axes; floor None: the axis fits the values around 1."""
    font = ImageFont.load_default(13)
    left, right = LABEL, WIDTH - MARGIN
    top, bottom = number * PANEL + 2 * MARGIN, (number + 1) * PANEL - MARGIN - 6
    values = [y for line in lines for _, y in line.points if np.isfinite(y)] or [1.0]
    high = float(np.quantile(values, 0.99)) * 1.05 if floor is not None else max(1.0, *values) + 0.02
    low = floor if floor is not None else min(1.0, *values) - 0.02
    span = high - low or 1.0
    pen.rectangle((left, top, right, bottom), outline=SOFT)
    pen.text((left, top - MARGIN), title, fill=INK, font=font)
    pen.text((4, top), f"{high:.3g}", fill=INK, font=font)
    pen.text((4, bottom - 14), f"{low:.3g}", fill=INK, font=font)
    pen.text((right, bottom + 3), f"{last} steps", fill=INK, font=font, anchor="ra")
    place = right

    def at(x: float, y: float) -> tuple[float, float]:
        share = min(max((y - low) / span, 0.0), 1.0)
        return left + x / last * (right - left), bottom - share * (bottom - top)

    if floor is None:
        pen.line([at(0, 1.0), at(last, 1.0)], fill=GREY)
    for line in reversed(lines):
        spots = [at(x, y) for x, y in line.points]
        if len(spots) > 1:
            pen.line(spots, fill=line.colour, width=2)
        for x, y in spots if floor is None else ():
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=line.colour)
        if line.name:
            pen.text((place, top - MARGIN), line.name, fill=line.colour, font=font, anchor="ra")
            place -= int(pen.textlength(line.name, font=font)) + 16
