"""What a context adapter has learned, and whether sampling gains by it.

r_phi(x_0, c, t) can smuggle x_0 itself into the noised picture. Then the loss falls and sampling, which has only the
prediction of x_0, gains nothing. So what is learned is measured three ways, each against r = 0 on the same noise: the
loss where r sees x_0, the loss where r sees the prediction, and the error of pictures that the sampler really draws.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..training import generator
from .adapter import ContextAdapter
from .bias import RELEASED_CODE
from .objective import CLEAN, PREDICTED, Objective
from .sampling import ContextSampling, SamplerSettings

PROBE_LEVELS = 6  # noise levels at which the loss is measured, evenly spaced over the schedule
SAMPLED_FROM, SAMPLED_STEPS = 0.25, 10  # where in the schedule the sampling begins, and its steps


@dataclass(frozen=True)
class Validation:
    """Errors relative to r = 0 after `step` steps: 1 is no gain, 0.9 a tenth less.

    clean: the loss, r seeing x_0. predicted: the loss, r seeing the prediction, as in sampling. sampled: squared error
    of pictures drawn by the sampler from noised ones.
    """

    step: int
    clean: float
    predicted: float
    sampled: float

    @property
    def finite(self) -> bool:
        """Whether all three are numbers."""
        return all(math.isfinite(value) for value in (self.clean, self.predicted, self.sampled))

    def __str__(self) -> str:
        return (
            f"against the plain model on the same noise: loss {percent(self.predicted)} where the adapter sees "
            f"{PREDICTED}, {percent(self.clean)} where it sees {CLEAN}, error of sampled pictures "
            f"{percent(self.sampled)}"
        )


def percent(relative: float) -> str:
    """A relative error as a change: 0.9 is "10.0 % less"."""
    change = 100.0 * (relative - 1.0)
    return f"{abs(change):.1f} % {'more' if change > 0 else 'less'}"


def verdict(formula: str, train_on: str, frozen: bool, last: Validation) -> str:
    """In words: is what the training loss gained there in sampling, too?"""
    trained = 1.0 - (last.clean if train_on == CLEAN else last.predicted)
    sampled = 1.0 - last.sampled
    if formula == RELEASED_CODE and frozen:
        return "the released code samples plainly, so that with a frozen U-Net sampling cannot change"
    if trained < 0.002:
        return "little was learned: train for more steps, or with a higher learning rate"
    if sampled < 0.0:
        return (
            "a leak: the loss fell, sampling got worse. The adapter uses what only the true picture holds; train on "
            f"{PREDICTED}, for fewer steps, or sample with less strength"
        )
    if sampled < 0.25 * trained:
        return "partly a leak: the loss fell by far more than sampling gained"
    return "no leak: what the loss gained, sampling gains too"


@dataclass(frozen=True)
class FromNoise:
    """Stands for the host's model in a sampler function that begins at a latent without a bias (k_T := 0)."""

    model: Any
    noise: Tensor
    latent_image: None = None

    @property
    def inner_model(self) -> Any:
        """The guider."""
        return self.model.inner_model

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(*args, **kwargs)


class Validator:
    """Measures the objective's network against r = 0, always on the same pictures (`rows`) and noise."""

    @torch.no_grad()
    def __init__(self, objective: Objective, rows: list[int], seed: int):
        self.objective, self.rows, self.seed = objective, rows, seed
        drawn, self.probes = generator(seed + 1), []
        for i in range(PROBE_LEVELS):
            draw = objective.draw(rows, [(i + 0.5) / PROBE_LEVELS] * len(rows), drawn)
            losses, denoised = objective.weighted(draw, draw.plain())
            self.probes.append((draw, denoised, float(losses.mean())))
        self.plain_error = self.sampled(0.0)[0]

    @torch.no_grad()
    def measure(self, step: int) -> tuple[Validation, Tensor]:
        """(errors of the network as it is, pictures that were sampled with it)."""
        error, pictures = self.sampled(1.0)
        clean, predicted = (self.relative_loss([seen[i] for seen in self.seen]) for i in (0, 1))
        return Validation(step, clean, predicted, error / self.plain_error), pictures

    @property
    def seen(self) -> list[tuple[Tensor, Tensor]]:
        """(x_0, the prediction of it without a bias) of every probe."""
        return [(draw.clean, denoised) for draw, denoised, _ in self.probes]

    def relative_loss(self, seen: list[Tensor]) -> float:
        """The loss over all probes, r evaluated at `seen`, against that of r = 0."""
        losses = [
            float(self.objective.losses(draw, each)[0].mean())
            for (draw, *_), each in zip(self.probes, seen, strict=True)
        ]
        return sum(losses) / sum(plain for *_, plain in self.probes)

    def sampled(self, strength: float) -> tuple[float, Tensor]:
        """(mean squared error, pictures), noised without a bias and drawn with the context-aware sampler."""
        objective = self.objective
        share = [SAMPLED_FROM + (1.0 - SAMPLED_FROM) * i / SAMPLED_STEPS for i in range(SAMPLED_STEPS + 1)]
        levels = torch.tensor([float(objective.sampling.percent_to_sigma(s)) for s in share])
        draw = objective.draw(self.rows, share[:1] * len(self.rows), generator(self.seed + 2))
        objective.pick.rows, x = self.rows, draw.plain()
        sight = objective.sight.of_rows(self.rows) if objective.sight else None
        adapter = ContextAdapter.of(copy.deepcopy(objective.network), sight=sight)
        sampler = ContextSampling(adapter, SamplerSettings(formula=objective.formula, strength=strength))
        drawn = sampler(FromNoise(objective.model, x), x, levels.to(x), objective.arguments, disable=True)
        return float((drawn - draw.clean).float().pow(2).mean()), drawn
