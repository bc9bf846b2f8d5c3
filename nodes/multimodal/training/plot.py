"""The course of a multimodal encoder's training as a picture."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...contextdiff.plot import BLUE, GREEN, PANEL, RED, SOFT, WIDTH, Line, panel, smoothed
from .fit import History

BANDS = {"little noise": (2 / 3, 1.0, BLUE), "middle": (1 / 3, 2 / 3, GREEN), "much noise": (0.0, 1 / 3, RED)}


def draw(history: History) -> Tensor:
    """IMAGE (1, H, W, 3) in 0..1, two panels: the loss, and the loss by noise level."""
    losses = [(i, loss) for i, loss in enumerate(history.losses, 1) if math.isfinite(loss)]
    points = [(s + 1 - history.before, share, loss) for s, share, loss in history.points if math.isfinite(loss)]
    bands = [
        Line(name, colour, smoothed([(s, loss) for s, share, loss in points if low <= share <= high]))
        for name, (low, high, colour) in BANDS.items()
    ]
    sheet = Image.new("RGB", (WIDTH, 2 * PANEL), "white")
    pen, last = ImageDraw.Draw(sheet), max(1, len(history.losses))
    panel(pen, 0, "training loss", [Line("", SOFT, losses), Line("", RED, smoothed(losses))], last, 0.0)
    panel(pen, 1, "by noise level", bands, last, 0.0)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]
