"""Flow-matching models: the way up to noise, and samplers for the way down."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import flow_inversion as maths
from .. import host
from ..settings import Settings

UNI_INV, FIREFLOW, EULER = "Uni-Inv", "FireFlow", "Euler"
UP = {UNI_INV: maths.uni_inv_step, FIREFLOW: maths.fireflow_step, EULER: maths.euler_step}
DOWN = {UNI_INV: maths.euler_step, FIREFLOW: maths.fireflow_step, EULER: maths.euler_step}


@dataclass(frozen=True)
class FlowSamplerSettings(Settings):
    """How a flow's inverted noise is sampled; see PalimpsestFlowSampler for what each does."""

    method: str = FIREFLOW
    source_rows: int = 1


def velocity_in(predict: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """v(x, t) of a model that gives the denoised picture. At level 0 it is asked at the lowest that tells it."""

    def velocity(x: Tensor, t: float) -> Tensor:
        level = max(t, host.LOWEST)
        return maths.velocity_of(x, predict(x, level), level)

    return velocity


class FlowClimb:
    """A step up after the other, by one of UP; made for one run."""

    def __init__(self, method: str):
        self.step, self.last = UP[method], None

    def __call__(self, predict: Callable, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """x (B, C, ...) at sigma -> at sigma_next."""
        x, self.last = self.step(velocity_in(predict), x, self.last, sigma, sigma_next)
        return x


@dataclass(frozen=True, eq=False)
class FlowSampling:
    """A host sampler function: the way down that belongs to a way up.

    trajectory: the source's; the first `source_rows` of the batch are held on it.
    """

    method: str
    trajectory: host.Trajectory | None = None
    source_rows: int = 0

    adds_noise = False  # as host.agreement asks

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict | None = None,
        callback: Callable | None = None,
        disable: bool | None = None,
        **_: Any,
    ) -> Tensor:
        """x (B, C, ...) at sigmas[0] -> at sigmas[-1]. Raises ValueError for levels that rise, and rows that lack."""
        from comfy.k_diffusion.sampling import trange

        levels, denoised, last = sigmas.tolist(), x, None
        self.refuse_unsound(x, levels)

        def predict(latent: Tensor, sigma: float) -> Tensor:
            nonlocal denoised
            denoised = model(latent, latent.new_full((len(latent),), sigma), **(extra_args or {}))
            return denoised

        x = self.held(x, levels[0])
        for i in trange(len(levels) - 1, disable=disable):
            before = x
            x, last = DOWN[self.method](velocity_in(predict), x, last, levels[i], levels[i + 1])
            x = self.held(x, levels[i + 1])
            if callback is not None:
                callback({"i": i, "x": before, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        return x

    def held(self, x: Tensor, sigma: float) -> Tensor:
        """x with the source's rows on its way: what a step with the stored offset arrives at, kernels.with_offset."""
        if self.trajectory is None or not self.source_rows:
            return x
        source = host.in_dimensions_of(host.latents_at(self.trajectory, sigma), x).to(x)
        rows = source.expand(self.source_rows, *source.shape[1:])
        return torch.cat([rows, x[self.source_rows :]])

    def refuse_unsound(self, x: Tensor, levels: list[float]) -> None:
        """Raise ValueError for levels that do not fall, and where there are fewer rows than the source's."""
        if any(high <= low for high, low in itertools.pairwise(levels)):
            raise ValueError(
                f"the noise levels must fall, they read {levels[0]:.4g} ... {levels[-1]:.4g}: this sampler is for the "
                "way down, Invert Picture walks up."
            )
        if self.trajectory is None or not self.source_rows:
            return
        if self.source_rows > len(x):
            raise ValueError(
                f"source_rows is {self.source_rows}, the sampled batch has {len(x)}: sample a batch of source and "
                "edits (Repeat Latent Batch), or set source_rows to 0."
            )
        channels = self.trajectory.latents.shape[2]
        if channels != x.shape[1]:
            raise ValueError(
                f"the trajectory holds latents of {channels} channels, the sampled one has {x.shape[1]}: invert the "
                "picture with this model."
            )
        self.trajectory.check_batch(x[: self.source_rows])
