"""Alphas that are learned from pairs: pictures, and what should have become of them (founding paper, section 3.5)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...kernels import feature_blend as maths
from ...kernels.ddim import ddim_step
from .. import host, training
from .blend import BlendFeatures
from .fitting import FitAlphas, Prompts, Report, TuneSettings


class FitPairs(FitAlphas):
    """A host sampler function: it samples the edits of some pairs after the other, a step of Adam at every level.

    edited T (B, C, H, W): the trajectory's pictures as they should be, in the model's scale. The latent is the one that
    sampling with the alphas learned so far has come to, from the source's inverted noise. T under that noise would give
    the answer away: the source's features know the noise, and all alphas would fall to 0.
    """

    towards = "the edited pictures"

    def __init__(self, blend: BlendFeatures, settings: TuneSettings, edited: Tensor, report: Report):
        super().__init__(blend, settings, None, report)
        self.edited = edited

    def begin(self, model: Any, x: Tensor, arguments: dict) -> None:
        super().begin(model, x, arguments)
        self.model, self.arguments, self.pairs = model, arguments, self.order_of_pairs()

    def true_latents(self) -> Tensor:
        return self.edited

    def order(self) -> Iterator[int]:
        """Indices of levels, from noise to picture and again."""
        levels = itertools.cycle(range(self.blend.trajectory.steps))
        return itertools.islice(levels, self.settings.steps)

    def order_of_pairs(self) -> Iterator[tuple[int, ...]]:
        """Pairs of every sampling, in their order: all of them before any comes again, shuffled by the seed."""
        generator, left = random.Random(self.settings.seed + 1), []
        pairs = len(self.edited)
        wanted = min(self.settings.pairs_per_step, pairs)
        while True:
            rows = set()
            while len(rows) < wanted:
                left = left or generator.sample(range(pairs), pairs)
                rows.add(left.pop())
            yield tuple(sorted(rows))

    def lesson(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(latent, blended prediction, loss) of some pairs at a level; the sampling goes one step on."""
        trajectory = self.blend.trajectory
        sigma, sigma_next = trajectory.sigmas[index : index + 2]
        if index == 0:
            self.rows = next(self.pairs)
            self.latent = trajectory.latents[0][list(self.rows)].to(self.like).clone()
        source, edited = (t[list(self.rows)].to(self.like).clone() for t in (trajectory.latents[-1], self.edited))
        here = self.latent
        options = host.showing(self.arguments["model_options"], self.rows, len(self.edited))
        level = here.new_full((len(self.rows),), sigma)
        denoised = self.model(here, level, **self.arguments | {"model_options": options})
        self.latent = ddim_step(here, denoised.detach(), sigma, sigma_next)
        return here, denoised, maths.pair_loss(denoised, edited, source)


def paired(
    model: Any, trajectory: host.Trajectory, prompts: Prompts, edited: Tensor, mask: Tensor | None
) -> tuple[Prompts, Tensor]:
    """(prompts with one row or one for each pair, the edited pictures in the model's scale).

    edited as on a LATENT socket. Raises ValueError where they are not the trajectory's pictures, for prompts of another
    number, and for a mask, which would have nothing to say.
    """
    host.require_channels(model, edited)
    if edited.shape != trajectory.latents.shape[1:]:
        (pictures, _, height, width), (given, _, *size) = trajectory.latents.shape[1:], edited.shape
        raise ValueError(
            f"edited has {given} pictures of {size[1]} x {size[0]} latent cells, the trajectory {pictures} of "
            f"{width} x {height}: encode the edited picture of each source, in their order, at their size."
        )
    if mask is not None:
        raise ValueError(
            "mask and edited are both connected: the edited pictures say themselves what stays; take one of them off."
        )
    named = {"positive": prompts.source, "target_positive": prompts.edit, "negative": prompts.negative}
    joined = {
        name: None if prompt is None else training.one_prompt_per_picture(prompt, len(edited), name)
        for name, prompt in named.items()
    }
    return Prompts(*joined.values()), model.model.process_latent_in(edited.clone()).cpu()


def seen(trajectory: host.Trajectory, settings: TuneSettings) -> str:
    """What a report adds: how many of the trajectory's pairs had their edit sampled, and what all of them take."""
    pairs, together = trajectory.pictures, min(settings.pairs_per_step, trajectory.pictures)
    samplings, all_steps = settings.steps // trajectory.steps, trajectory.steps * math.ceil(pairs / together)
    if settings.steps < all_steps:
        done = min(samplings * together, pairs)
        return f"; {done} of {pairs} pairs sampled to the end: set steps to {all_steps} for all"
    return f"; towards {pairs} edited pictures"
