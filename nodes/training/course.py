"""The course of a training as pictures: its losses, and what it drew on the way."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import plots
from .fitting import History, Preview

SHOWN = 6  # previews in a row of a sheet


def plot(history: History) -> Tensor:
    """IMAGE (1, H, W, 3): the loss, and the loss by noise level."""
    first = history.before + 1
    losses = list(enumerate(history.losses, first))
    points = [(step + 1, place, loss) for step, place, loss in history.points]
    panels = (
        plots.Panel("training loss", plots.with_mean(losses)),
        plots.Panel("by noise level", plots.by_noise(points)),
    )
    return plots.training(panels, history.steps)


def shown_previews(history: History) -> Sequence[Preview]:
    """At most SHOWN of a training's previews, spread over it, the last among them."""
    shown = history.previews[:: max(1, -(-len(history.previews) // SHOWN))]
    if history.previews and shown[-1] is not history.previews[-1]:
        return [*shown[: SHOWN - 1], history.previews[-1]]
    return shown
