"""The course of a LoRA's training as pictures: its losses, and what it drew on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import plots
from .fit import History

SHOWN = 6  # previews in a row of the sheet


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


def sheet(model: Any, vae: Any, history: History, prompts: Sequence[str]) -> Tensor:
    """IMAGE (1, H, W, 3): a row for each previewed prompt, its pictures from left to right in the order of epochs."""
    shown = history.previews[:: max(1, -(-len(history.previews) // SHOWN))]
    if history.previews and shown[-1] is not history.previews[-1]:
        shown = [*shown[: SHOWN - 1], history.previews[-1]]

    def picture(latent: Tensor) -> Tensor:
        return vae.decode(model.model.process_latent_out(latent))[0].cpu().float()

    rows = [
        plots.Row([(picture(preview.latents[number]), f"epoch {preview.epoch}") for preview in shown], prompt)
        for number, prompt in enumerate(prompts)
    ]
    return plots.sheet(rows, side=256, columns=max(1, len(shown)))
