"""The course of a multimodal encoder's training as a picture."""

from __future__ import annotations

import math

from torch import Tensor

from ... import plots
from .fit import History


def draw(history: History) -> Tensor:
    """IMAGE (1, H, W, 3) in 0..1, two panels: the loss, and the loss by noise level."""
    losses = [(i, loss) for i, loss in enumerate(history.losses, 1) if math.isfinite(loss)]
    points = [(s + 1 - history.before, share, loss) for s, share, loss in history.points if math.isfinite(loss)]
    panels = (
        plots.Panel("training loss", plots.with_mean(losses)),
        plots.Panel("by noise level", plots.by_noise(points, noise_grows=False)),
    )
    return plots.training(panels, len(history.losses))
