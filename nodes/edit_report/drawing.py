"""Source, edit and their difference side by side, and the course of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import plots
from .measuring import MEASURES, Edit, Numbers

CELL, LABEL, GAP, MOST_ROWS = 256, 22, 6, 8
AMPLIFIED = 4.0  # of the differences
CURVES = {"psnr": (40, 90, 160), "background_psnr": (190, 110, 30)}


def draw(edit: Edit, numbers: Numbers) -> Tensor:
    """IMAGE of up to eight pictures with their differences, and below the PSNR of every picture of a batch."""
    count = min(len(edit.edited), MOST_ROWS)
    height = round(CELL * edit.edited.shape[1] / edit.edited.shape[2])
    columns = ["source", "edited", f"difference x {AMPLIFIED:g}", "difference outside the mask"]
    columns = columns[: 3 + (edit.mask is not None)]
    curve = CELL if len(edit.edited) > 1 else 0
    width, bottom = len(columns) * (CELL + GAP) - GAP, LABEL + count * (height + GAP)
    canvas = plots.Canvas.blank(width, bottom + curve)
    for column, text in enumerate(columns):
        canvas.text((column * (CELL + GAP) + CELL / 2, LABEL / 2), text, anchor="mm")
    for row in range(count):
        for column, cell in enumerate(cells(edit, row)):
            canvas.picture((column * (CELL + GAP), LABEL + row * (height + GAP)), cell, (CELL, height))
    if curve:
        draw_curves(canvas, numbers, (44, bottom + 24, width - 10, bottom + curve - 24))
    return canvas.done()


def cells(edit: Edit, row: int) -> list[Tensor]:
    """The pictures (H, W, 3) of one row."""
    source, edited = edit.source[row], edit.edited[row]
    difference = (edited - source).abs().mean(-1, keepdim=True).mul(AMPLIFIED).clamp(0, 1)
    outside = [] if edit.mask is None else [heat(difference * (edit.mask[row][..., None] == 0))]
    return [source, edited, heat(difference), *outside]


def heat(amount: Tensor) -> Tensor:
    """Amounts (H, W, 1) in 0..1 as colours from black over red and yellow to white."""
    return torch.cat([(3 * amount - i).clamp(0, 1) for i in range(3)], -1)


def draw_curves(canvas: plots.Canvas, numbers: Numbers, box: plots.Box) -> None:
    """PSNR of every picture of a batch, whole and outside the mask, over its number."""
    left, top, _, bottom = box
    found = {name: numbers[name].double() for name in CURVES if name in numbers}
    finite = torch.cat([values[torch.isfinite(values)] for values in found.values()])
    low, high = (float(finite.min()) - 0.5, float(finite.max()) + 0.5) if finite.numel() else (0.0, 1.0)
    axes = plots.Axes(box, len(numbers["psnr"]) - 1, low, high)
    canvas.frame(box, (200, 200, 200))
    for value, y in ((high, top), (low, bottom)):
        canvas.text((left - 6, y), f"{value:.1f}", (90, 90, 90), anchor="rm")
    for place, (name, values) in enumerate(found.items()):
        canvas.plot(axes, [plots.Line(name, CURVES[name], list(enumerate(values.nan_to_num(nan=low).tolist())))])
        label = f"{MEASURES[name].label} per picture, dB"
        canvas.text((left + 4 + place * 260, top - 12), label, CURVES[name], anchor="lm")
