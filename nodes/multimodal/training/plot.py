"""The course of a multimodal encoder's training as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ... import plots
from .course import ALIGN, DRAW, READ
from .fit import History

TITLES = {ALIGN: "align: error of the tokens", READ: "read: loss of the U-Net alone", DRAW: "draw: loss"}


def draw(history: History) -> Tensor:
    """IMAGE (1, H, W, 3) in 0..1: the loss, a panel for each lesson, and the loss by noise level."""
    points = [
        (step + 1 - history.before, share, loss)
        for step, share, loss in history.points
        if math.isfinite(loss) and history.course.lesson(step) != ALIGN
    ]
    panels = [*losses(history), plots.Panel("by noise level", plots.by_noise(points, noise_grows=False))]
    return plots.training(panels if points else panels[:-1], len(history.losses))


def losses(history: History) -> list[plots.Panel]:
    """A panel for the loss of each lesson, all over the same steps."""
    lessons = history.by_lesson() if history.course.before_drawing else {}
    if not lessons:
        return [plots.Panel("training loss", line(history.losses, 1))]
    return [
        plots.Panel(TITLES[name], line(part.losses, part.before - history.before + 1)) for name, part in lessons.items()
    ]


def line(values: Sequence[float], first: int) -> list[plots.Line]:
    """Losses from step `first` on, and their running mean."""
    return plots.with_mean([(i, loss) for i, loss in enumerate(values, first) if math.isfinite(loss)])
