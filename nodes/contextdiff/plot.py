"""The course of a context adapter's training as a picture."""

from __future__ import annotations

from torch import Tensor

from .. import plots
from .fit import History

MEASURED = (
    ("loss, sees x0", "clean", plots.BLUE),
    ("loss, sees x0_hat", "predicted", plots.GREEN),
    ("sampled", "sampled", plots.RED),
)


def draw(history: History) -> Tensor:
    """IMAGE (1, H, W, 3) in 0..1, three panels: the loss, the loss by noise level, and errors against r = 0."""
    losses = list(enumerate(history.losses, 1))
    points = [(step + 1, angle, loss) for step, angle, loss in history.points]
    measured = [
        plots.Line(name, colour, [(0, 1.0), *((v.step, getattr(v, field)) for v in history.validations)])
        for name, field, colour in MEASURED
    ]
    panels = (
        plots.Panel("training loss (eq. 6)", plots.with_mean(losses)),
        plots.Panel("by noise level", plots.by_noise(points)),
        plots.Panel("error against the plain model (1)", measured, around_one=True),
    )
    return plots.training(panels, len(losses))
