"""The course of a LoRA's training as a picture: what it drew on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import plots
from ..training.course import shown_previews
from ..training.fitting import History


def sheet(model: Any, vae: Any, history: History, prompts: Sequence[str]) -> Tensor:
    """IMAGE (1, H, W, 3): a row for each previewed prompt, its pictures from left to right in the order of epochs."""
    shown = shown_previews(history)

    def picture(latent: Tensor) -> Tensor:
        return vae.decode(model.model.process_latent_out(latent))[0].cpu().float()

    rows = [
        plots.Row([(picture(preview.latents[number]), f"epoch {preview.epoch}") for preview in shown], prompt)
        for number, prompt in enumerate(prompts)
    ]
    return plots.sheet(rows, side=256, columns=max(1, len(shown)))
