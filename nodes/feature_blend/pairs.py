"""Alphas that are learned from pairs: pictures, and what should have become of them (founding paper, section 3.5)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...kernels import feature_blend as maths
from .. import host, training
from .blend import BlendFeatures
from .fitting import FitAlphas, Prompts, Report, TuneSettings


class FitPairs(FitAlphas):
    """A host sampler function: steps of Adam at levels of the trajectory, each for some of its pairs, towards the edit.

    edited (B, C, H, W): the trajectory's pictures as they should be, in the model's scale. The model is shown them
    under the noise that the sources have at that level, where sampling stands if the edit goes right.
    """

    towards = "the edited pictures"

    def __init__(self, blend: BlendFeatures, settings: TuneSettings, edited: Tensor, report: Report):
        super().__init__(blend, settings, None, report)
        self.edited = edited

    def begin(self, model: Any, x: Tensor, arguments: dict) -> None:
        super().begin(model, x, arguments)
        self.model, self.arguments, self.rows = model, arguments, self.order_of_pairs()

    def true_latents(self) -> Tensor:
        return self.edited

    def order_of_pairs(self) -> Iterator[tuple[int, ...]]:
        """Pairs of every step, in their order: all of them before any comes again, shuffled by the seed."""
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
        """(latent, blended prediction, loss) of some pairs at a level."""
        trajectory, rows = self.blend.trajectory, next(self.rows)
        pictures = list(rows)
        noised, source = (trajectory.latents[i][pictures].to(self.like).clone() for i in (index, -1))
        edited = self.edited[pictures].to(self.like).clone()
        here = maths.with_noise_of(edited, source, noised)
        options = host.showing(self.arguments["model_options"], rows, len(self.edited))
        level = here.new_full((len(rows),), trajectory.sigmas[index])
        denoised = self.model(here, level, **self.arguments | {"model_options": options})
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
