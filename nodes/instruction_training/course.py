"""The course of a training as a picture: what it made of some triples on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import plots
from ..training.course import shown_previews
from ..training.fitting import History
from .examples import Example


def sheet(model: Any, vae: Any, history: History, shown: Sequence[Example]) -> Tensor:
    """IMAGE (1, H, W, 3): a row for each triple: its picture, what was drawn step by step, and its result."""
    previews = shown_previews(history)

    def picture(latent: Tensor) -> Tensor:
        return vae.decode(latent)[0].cpu().float()

    def drawn(latent: Tensor) -> Tensor:
        return picture(model.model.process_latent_out(latent))

    rows = [
        plots.Row(
            [
                (picture(example.source), "picture"),
                *((drawn(preview.latents[number]), f"step {preview.epoch}") for preview in previews),
                (drawn(example.latent), "result"),
            ],
            example.instruction,
        )
        for number, example in enumerate(shown)
    ]
    return plots.sheet(rows, side=256, columns=len(previews) + 2)
