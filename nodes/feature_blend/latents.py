"""The source's latents, and how the latent of an edit is held to them outside of a mask while it is sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import feature_blend as maths
from ...kernels.ddim import rescale_to_level
from .. import host

SOURCE_LATENTS: dict[str, Callable[[host.Trajectory, int], host.Trajectory]] = {
    "trajectory": lambda trajectory, seed: trajectory,
    "re-noised source": host.renoised,
}


TECHNIQUE = "Feature Blend"
MASKED_NOISE = (
    "a noise mask lies on inverted noise: where it is black the picture stays noise; take it off the latent (Set "
    "Latent Noise Mask), this node's mask keeps what is outside"
)


class HeldRun:
    """What one sampling run keeps: its levels, down to which the latent is held longer, and masks on latents' grids."""

    def __init__(self) -> None:
        self.levels: list[float] = []
        self.above = math.inf
        self.masks: dict[tuple, Tensor] = {}


@dataclass(frozen=True, eq=False)
class HeldLatents:
    """What the latent is held to, where and until when.

    mask (1 or B, h, w), of a clip (1 or F, h, w): black where it is held, at noise levels above `above`; without it
    nowhere. released_code: as PFB-Diff's code has it (PalimpsestFeatureBlend).
    """

    trajectory: host.Trajectory
    above: float
    mask: Tensor | None = None
    released_code: bool = False
    remarks: host.Remarks = host.UNHEARD
    name: str = field(default_factory=lambda: host.source_name("feature_blend.latents"))

    def at(self, sigma: float, run: host.Run) -> bool:
        """Whether it is held at a noise level of a run."""
        return self.mask is not None and sigma > min(self.above, self.kept(run).above)

    def hold_on(self, run: host.Run, above: float) -> None:
        """Hold it longer in this run."""
        self.kept(run).above = above

    def kept(self, run: host.Run) -> HeldRun:
        """What a run keeps."""
        return run.kept(self.name, HeldRun)

    def rows(self, x: Tensor, run: HeldRun) -> Tensor:
        """The mask on the latent's grid, (B, 1, H, W), of clips (B, 1, 1, H, W) or (1, 1, F, H, W)."""
        name = (tuple(x.shape), x.device)
        if name not in run.masks:
            run.masks[name] = host.rows_on(self.mask, x).to(x)
        return run.masks[name]

    def target(self, sigma: float, sigma_next: float) -> Tensor:
        """The source's latent that a step from sigma arrives at outside of the mask."""
        if self.released_code:  # it blends with the level just left, as if it were the next
            return rescale_to_level(host.latents_at(self.trajectory, sigma), sigma, sigma_next)
        return host.latents_at(self.trajectory, sigma_next)


@dataclass(frozen=True)
class BeginHeld:
    """SAMPLER_SAMPLE wrapper: note the run's levels, and begin outside of the mask on the source's path."""

    held: HeldLatents

    def __call__(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, *args: Any, **kwargs: Any) -> Any:
        callback, noise, latent_image, denoise_mask, *others = args
        held, of_run = self.held, host.run_of(extra_args["model_options"])
        run = held.kept(of_run)
        held.trajectory.check_batch(noise)
        run.levels = sigmas.tolist()
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        if denoise_mask is not None and not bool(noise.any()) and held.trajectory.begins_at(latent):
            held.remarks.say_once(of_run, MASKED_NOISE)
        if held.released_code and not bool(noise.any()) and len(run.levels) > 2:
            # It inverts up to t = 999 and samples from 981 on, with the latent as it is.
            latent_image = rescale_to_level(latent, *run.levels[:2])
            sigmas, run.levels = sigmas[1:], run.levels[1:]
        elif held.at(run.levels[0], of_run) and denoise_mask is None:  # that mask needs the picture itself
            there = host.latents_at(held.trajectory, run.levels[0])
            mask, there = held.rows(noise, run), host.in_dimensions_of(there, latent).to(latent)
            if host.is_flow_sampling(sampling := guider.inner_model.model_sampling):
                # Such a model fades its latent out: what is outside begins by noise that leads there.
                noise = maths.blend(noise, host.noise_to(sampling, run.levels[0], there, latent), mask)
            else:
                latent_image, noise = maths.blend(latent, there, mask), noise * mask
        args = (callback, noise, latent_image, denoise_mask, *others)
        return executor(guider, sigmas, extra_args, *args, **kwargs)


@dataclass(frozen=True)
class HoldLatents:
    """PREDICT_NOISE wrapper: show the model the source's latent outside of the mask, and land on its next one there.

    The sampler is given the x_0 with which an Euler step does so. The host's own inpainting mask acts around this, and
    wins where it is black.
    """

    held: HeldLatents

    def __call__(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None, **kwargs
    ) -> Tensor:
        held, (sigma, model_options) = self.held, host.noise_level(timestep, model_options)
        of_run = host.run_of(model_options)
        if not held.at(sigma, of_run):
            return executor(x, timestep, model_options, seed, **kwargs)
        run = held.kept(of_run)
        mask = held.rows(x, run)
        here = x
        if not held.released_code:
            here = host.in_dimensions_of(host.latents_at(held.trajectory, sigma), x).to(x)
        denoised = executor(maths.blend(x, here, mask), timestep, model_options, seed, **kwargs)
        sigma_next = max((level for level in run.levels if level < sigma * (1 - 1e-5)), default=0.0)
        there = host.in_dimensions_of(held.target(sigma, sigma_next), x).to(x)
        return maths.blend(denoised, maths.straight_line_denoised(here, there, sigma, sigma_next), mask)


def hold_latents(patched: Any, held: HeldLatents) -> None:
    """Hold the latent on a clone, where there is something to hold."""
    from comfy.patcher_extension import WrappersMP

    host.observe(patched)
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, held.name, BeginHeld(held))
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, held.name, HoldLatents(held))
