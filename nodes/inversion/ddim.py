"""Inversion and reconstruction through the host's guider and samplers: DDIM here, flow matching in flow.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.ddim import ddim_step, predicted_noise, rescale_to_level
from .. import host
from ..contextdiff import ContextSampling
from ..settings import Settings
from .contextual import RecordContext
from .flow import UNI_INV, FlowClimb
from .presets import ALGORITHM_1, EQUATION_4

NEXT_LEVEL = "next noise level"
CURRENT_LEVEL = "current noise level"


@dataclass(frozen=True)
class InvertSettings(Settings):
    """How a picture is inverted; see PalimpsestInvert for what each does."""

    PRESETS: ClassVar = {
        ALGORITHM_1: {"steps": 50, "guidance": 7.5, "predict_at": NEXT_LEVEL},
        EQUATION_4: {"steps": 50, "guidance": 1.0, "predict_at": NEXT_LEVEL},
    }

    steps: int = 50
    guidance: float = 1.0
    scheduler: str = "normal"
    predict_at: str = NEXT_LEVEL
    reconstruction_guidance: float = 1.0
    flow_method: str = UNI_INV
    context_strength: float = 1.0
    context_refinements: int = 6


def climb_at_next_level(predict: Callable, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One inversion step with eps asked at the level climbed to (the convention of published inversion code)."""
    x_next = rescale_to_level(x, sigma, sigma_next)
    return x + (sigma_next - sigma) * predicted_noise(x_next, predict(x_next, sigma_next), sigma_next)


def climb_at_current_level(predict: Callable, x: Tensor, sigma: float, sigma_next: float, lowest: float) -> Tensor:
    """One inversion step with eps asked where the latent is (DDIM's equation solved upward, literally).

    At sigma = 0 eps has no meaning; the network is asked at `lowest`, the smallest level it was trained on.
    """
    level = max(sigma, lowest)
    return x + (sigma_next - sigma) * predicted_noise(x, predict(x, level), level)


@dataclass(frozen=True)
class DiffusionClimb:
    """A step up after the other, in the chosen convention."""

    predict_at: str
    lowest: float

    def __call__(self, predict: Callable, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """x (B, C, H, W) at sigma -> at sigma_next."""
        if self.predict_at == NEXT_LEVEL:
            return climb_at_next_level(predict, x, sigma, sigma_next)
        return climb_at_current_level(predict, x, sigma, sigma_next, self.lowest)


class RecordClimb:
    """A host sampler function: integrate a clean latent up to noise and keep the latent at every level."""

    def __init__(self, climb: Callable[[Callable, Tensor, float, float], Tensor]):
        self.climb, self.latents = climb, []

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ):
        """x (B, C, H, W) at sigmas[0] = 0; sigmas ascending. Returns x unchanged: the result is in `latents`."""
        levels = sigmas.tolist()
        self.latents = [x.to("cpu", torch.float32, copy=True)]
        denoised = x

        def predict(latent: Tensor, sigma: float) -> Tensor:
            nonlocal denoised
            denoised = model(latent, latent.new_full((latent.shape[0],), sigma), **(extra_args or {}))
            return denoised

        state = x
        for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
            state = self.climb(predict, state, sigma, sigma_next)
            self.latents.append(state.to("cpu", torch.float32, copy=True))
            if callback is not None:
                callback({"i": i, "x": state, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return x


def descend(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
) -> Tensor:
    """A host sampler function: deterministic DDIM from x at sigmas[0] down to sigmas[-1]."""
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        denoised = model(x, x.new_full((x.shape[0],), sigma), **(extra_args or {}))
        x = ddim_step(x, denoised, sigma, sigma_next)
        if callback is not None:
            callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
    return x


def descending_schedule(model: Any, scheduler: str, steps: int, sigmas: Tensor | None) -> tuple[float, ...]:
    """The T+1 noise levels to invert along, from a SIGMAS input or the host's scheduler; always descending to 0.

    Raises ValueError for fewer than one step, NaN, or levels that do not descend.
    """
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    levels = [float(s) for s in sigmas]
    if len(levels) < 2:
        raise ValueError(f"the schedule has {max(len(levels) - 1, 0)} steps: it needs at least 1.")
    if not all(a > b for a, b in itertools.pairwise(levels)) or not levels[-1] >= 0:
        raise ValueError(f"the schedule must fall from noisy to clean, it reads {levels[0]:.4g} ... {levels[-1]:.4g}.")
    if levels[-1] > 0:
        raise ValueError(
            f"the schedule ends at sigma {levels[-1]:.4g}: inversion starts from a clean picture, end it at 0."
        )
    return tuple(levels)


def invert(
    model: Any,
    latent: Tensor,
    positive: list,
    negative: list | None = None,
    *,
    levels: tuple[float, ...],
    guidance: float = 1.0,
    predict_at: str = NEXT_LEVEL,
    flow_method: str = UNI_INV,
    context: ContextSampling | None = None,
    callback: Any = None,
) -> host.Trajectory:
    """Inversion of pictures: the latents at every noise level, from the same solver that will sample them.

    latent (B, C, H, W) as on a LATENT socket, or (B, C, F, H, W) of a video model; levels descending to 0. guidance 1
    costs one row a picture. predict_at: of a diffusion model; flow_method: of a flow-matching one.
    context goes up in their place.
    """
    flow = host.is_flow(model)
    lowest = float(model.get_model_object("model_sampling").sigma_min)
    climb = FlowClimb(flow_method) if flow else DiffusionClimb(predict_at, lowest)
    record = RecordClimb(climb) if context is None else RecordContext(context)
    prompts = {"positive": positive, "negative": negative, "guidance": guidance}
    host.sample(model, record, latent, sigmas=torch.tensor(levels[::-1]), **prompts, callback=callback)
    latents = torch.stack(record.latents[::-1])
    return host.Trajectory(
        sigmas=levels,
        latents=latents.squeeze(3) if latents.ndim == 6 else latents,
        guidance=guidance,
        prompt=host.conditioning_fingerprint(positive),
        layout=host.layout_fingerprint(model),
        flow=flow,
        contextual=context is not None,
    )
