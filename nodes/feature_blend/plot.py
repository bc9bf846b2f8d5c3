"""Learned blending weights and their loss as a picture."""

from __future__ import annotations

from torch import Tensor

from ..plots import BLUE, SOFT, Axes, Canvas, with_mean
from .weights import BlendWeights

WIDTH, ROW, MARGIN, LABEL, CURVE = 640, 22, 16, 90, 200


def draw(weights: BlendWeights) -> Tensor:
    """IMAGE (1, H, W, 3) in 0..1: a bar for every feature's alpha, and below the loss over the steps."""
    bars = len(weights.alphas) * ROW
    height = bars + CURVE + 6 * MARGIN
    canvas = Canvas.blank(WIDTH, height)
    left, right, top = MARGIN + LABEL, WIDTH - MARGIN - 40, 2 * MARGIN
    canvas.text((MARGIN, MARGIN // 2), "alpha: 0 the original, 1 the edit")
    for share in (0.0, 0.5, 1.0):
        x = left + share * (right - left)
        canvas.line([(x, top), (x, top + bars)], SOFT)
    for i, (name, alpha) in enumerate(weights.alphas.items()):
        y = top + i * ROW
        canvas.text((MARGIN, y + 3), name)
        canvas.bar((left, y + 4, left + max(1, alpha * (right - left)), y + ROW - 5), BLUE)
        canvas.text((right + 6, y + 3), f"{alpha:.2f}")
    draw_loss(canvas, weights.info.get("losses", []), (left, top + bars + 2 * MARGIN, right, height - 2 * MARGIN))
    return canvas.done()


def draw_loss(canvas: Canvas, losses: list[float], box: tuple[float, float, float, float]) -> None:
    """The loss, and its mean over a tenth of the steps, in a box."""
    left, top, right, bottom = box
    canvas.frame(box)
    canvas.text((MARGIN, top), "loss")
    if len(losses) < 2:
        return
    axes = Axes(box, len(losses) - 1, min(0.0, *losses), max(losses) or 1.0)
    canvas.plot(axes, with_mean(list(enumerate(losses))))
    canvas.text((right + 4, top), f"{axes.high:.2f}")
    canvas.text((right + 4, bottom - 14), f"{axes.low:.2f}")
    canvas.text((left, bottom + 4), f"{len(losses)} steps")
