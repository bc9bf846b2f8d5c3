"""What a trained encoder draws: some prompts of its dataset, by DDIM, beside the pictures they were made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....kernels.ddim import ddim_step
from ... import plots
from ...training import generator_at
from ..dataset import STAGES, Dataset
from ..interleaved import Picture, Prompt
from .lessons import Lessons

SAMPLES, SAMPLE_STEPS, SAMPLE_GUIDANCE = 4, 20, 6.0  # 6 is the paper's guidance, without a negative prompt


def sample_prompts(lessons: Lessons) -> list[tuple[int, Prompt]]:
    """Some records, spread over those that are trained on, and a prompt for each."""
    settings, records = lessons.settings, list(lessons.sizes)
    stage, chosen = STAGES[settings.stage], records[:: max(1, len(records) // SAMPLES)][:SAMPLES]
    return [
        (i, lessons.dataset.draw(i, stage, lessons.tokens, generator_at(settings.seed, "sample", i))) for i in chosen
    ]


def ddim(predict: Callable[..., Tensor], x: Tensor, sigmas: Tensor, rows: Sequence[tuple]) -> Tensor:
    """A picture drawn from noise x (1, C, h, w) of standard deviation 1, with guidance.

    predict(x, sigma, *row) is the model's x_0; rows: (without the prompt, with it). sigmas: the model's own, ascending.
    """
    places = torch.linspace(len(sigmas) - 1, 0, SAMPLE_STEPS).round().long()
    levels = [*sigmas[places].tolist(), 0.0]
    x = x * math.sqrt(1.0 + levels[0] ** 2)
    for sigma, sigma_next in itertools.pairwise(levels):
        level = x.new_full((1,), sigma)
        null, full = (predict(x, level, *row) for row in rows)
        x = ddim_step(x, null + SAMPLE_GUIDANCE * (full - null), sigma, sigma_next)
    return x.float().cpu()


def sample_sheet(vae: Any, dataset: Dataset, shown: Sequence[tuple[int, Prompt]], latents: Sequence[Tensor]) -> Tensor:
    """IMAGE of prompts, a row each: their crops, what was drawn, and the picture they were cut from.

    latents: what was drawn, as a VAE takes it; as many rows as there are of them.
    """
    rows = []
    for (record, prompt), latent in zip(shown, latents, strict=False):
        with torch.no_grad():
            picture = vae.decode(latent)
        cells = [
            *((part.pixels, part.name) for part in prompt if isinstance(part, Picture)),
            (picture.reshape(-1, *picture.shape[-3:])[0].float(), "drawn"),
            (dataset.picture(record), "the dataset's"),
        ]
        text = "".join(part if isinstance(part, str) else f"<{part.name}>" for part in prompt)
        rows.append(plots.Row(cells, text))
    return plots.sheet(rows)
