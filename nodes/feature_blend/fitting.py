"""How alphas are fitted: one step of Adam after the other, at noise levels of a picture's trajectory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels import feature_blend as maths
from .. import host, training
from ..host import gradient
from ..settings import Settings
from .blend import Alpha, BlendFeatures
from .layers import Feature, FeatureLayer
from .opponent import Opponent

PAPER = "paper"
Report = Callable[[int, float], None]


@dataclass(frozen=True)
class TuneSettings(Settings):
    """How alpha is fitted; see PalimpsestTuneFeatureBlend for what each does to the picture."""

    layers: str = "output, out"
    steps: int = 100
    learning_rate: float = 0.1
    guidance: float = 7.5
    keep_edit: float = 1.0
    adversarial: float = 0.0
    seed: int = 0
    pairs_per_step: int = 1

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        PAPER: {"layers": "output, out", "keep_edit": 0.0, "adversarial": 0.1},
    }


@dataclass(frozen=True)
class Prompts:
    """CONDITIONINGs: of the source, of the edit, and the negative one of the edit."""

    source: list
    edit: list
    negative: list | None = None


class LearnedAlphas(Mapping[Feature, Alpha]):
    """alpha = sigmoid(a) of every feature, a = 0 at first, which is the paper's 0.5; one for the whole picture.

    While `acting` is False there are none, and the model draws the edit as it is.
    """

    def __init__(self, layers: list[FeatureLayer], device: torch.device):
        self.raw = {layer.key: torch.zeros((), device=device, requires_grad=True) for layer in layers}
        self.acting = True

    def __getitem__(self, key: Feature) -> Alpha:
        return (torch.sigmoid(self.raw[key]),) * 2

    def __iter__(self) -> Iterator[Feature]:
        return iter(self.raw if self.acting else ())

    def __len__(self) -> int:
        return len(self.raw) if self.acting else 0

    def __contains__(self, key: object) -> bool:
        return self.acting and key in self.raw


class FitAlphas:
    """A host sampler function: at levels of the trajectory in random order, one step of Adam on alpha each."""

    towards = "the source, and the edit as the model draws it"

    def __init__(self, blend: BlendFeatures, settings: TuneSettings, mask: Tensor | None, report: Report):
        self.blend, self.settings, self.mask, self.report = blend, settings, mask, report
        self.alphas: LearnedAlphas = blend.alphas
        self.losses: list[float] = []

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x (B, C, H, W) gives device and dtype and is returned unchanged: the result is in `alphas` and `losses`."""

        self.begin(model, x, extra_args or {})
        weight = self.settings.adversarial
        opponent = Opponent(self.true_latents().to(x).clone(), self.settings.seed) if weight else None
        optimiser = torch.optim.Adam(list(self.alphas.raw.values()), self.settings.learning_rate)
        reader = gradient.LateReader()
        for step, index in enumerate(self.order()):
            host.stop_if_cancelled()
            here, denoised, loss = self.lesson(index)
            if opponent is not None:
                loss = loss + weight * opponent.loss(denoised)
            optimiser.zero_grad(set_to_none=True)
            # By the number of elements: half-precision gradients stay clear of underflow, and Adam is scale-free.
            (loss * x.numel()).backward()
            optimiser.step()
            self.note(step, reader.read(loss.detach()[None]))
            if callback is not None:
                sigma = self.blend.trajectory.sigmas[index]
                callback({"i": step, "x": here, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised.detach()})
        self.note(self.settings.steps - 1, reader.rest())
        return x

    def begin(self, model: Any, x: Tensor, arguments: dict) -> None:
        """What lasts for all steps."""
        self.predict, self.like = partial(model, **arguments), x
        self.inside, self.outside = self.regions(x)
        self.edits: dict[int, Tensor] = {}

    def true_latents(self) -> Tensor:
        """What the adversarial term takes for true, (B, C, H, W)."""
        return self.blend.trajectory.latents[-1]

    def lesson(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(latent, blended prediction, loss) at a level: the source outside of the mask, the edit inside."""
        x, trajectory = self.like, self.blend.trajectory
        sigma, sigma_next = trajectory.sigmas[index : index + 2]
        here, there = (trajectory.latents[i].to(x).clone() for i in (index, index + 1))
        level = x.new_full((len(x),), sigma)
        if index not in self.edits:
            self.edits[index] = self.plain_edit(self.predict, here, level)
        denoised = self.predict(here, level)
        source = maths.straight_line_denoised(here, there, sigma, sigma_next)
        rebuilt, changed = maths.tuning_losses(denoised, source, self.edits[index], self.outside, self.inside)
        return here, denoised, rebuilt + self.settings.keep_edit * changed

    def regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(inside, outside) of the mask on the latent's grid; everything is both without one."""
        if self.mask is None:
            everywhere = x.new_ones(1, 1, *x.shape[-2:])
            return everywhere, everywhere
        inside = host.picture_rows(self.mask, len(x), *x.shape[-2:]).to(x)
        return inside, 1 - inside

    def order(self) -> Iterator[int]:
        """Indices of levels: all of the window before any comes again, shuffled by the seed."""
        where = {level: i for i, level in enumerate(self.blend.trajectory.sigmas)}
        indices = [where[level] for level in host.source_levels(self.blend)]
        generator, left = random.Random(self.settings.seed), []
        for _ in range(self.settings.steps):
            if not left:
                left = generator.sample(indices, len(indices))
            yield left.pop()

    def plain_edit(self, predict: Callable, x: Tensor, level: Tensor) -> Tensor:
        """What the model draws of the edit with nothing blended."""
        self.alphas.acting = False
        try:
            with torch.no_grad():
                return predict(x, level)
        finally:
            self.alphas.acting = True

    def note(self, step: int, arrived: Tensor | None) -> None:
        """Keep and tell a loss that has arrived. Raises ValueError for NaN."""
        if arrived is None:
            return
        if not bool(torch.isfinite(arrived).all()):
            raise training.nan_error(f"at step {step + 1} of the tuning", "the prompts and the picture")
        self.losses.append(float(arrived))
        self.report(step, self.losses[-1])
