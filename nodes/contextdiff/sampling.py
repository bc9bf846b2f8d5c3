"""Context-aware sampling: ContextDiff's reverse process (and its inversion) as a sampler of the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.contextdiff import (
    ancestral_levels,
    contextual_climb,
    contextual_step,
    ddpm_step,
    flow_ancestral_step,
)
from ...kernels.ddim import ddim_step
from .. import host
from ..settings import Settings
from .adapter import ContextAdapter
from .bias import ANGLES, FORMULAS, PAPER, TrajectoryBias, no_bias, noisiest

AS_TRAINED = "as trained"
DDIM, DDPM = "ddim", "ddpm"
LOWEST = 1e-4  # stands for noise level 0 at the start of an inversion, as in the host's FlipSigmas

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Callable], Tensor]


# ------------------------------------------------------------------------ the stock steps, between two biases


def deterministic(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Callable) -> Tensor:
    """DDIM at eta 0: the host's `euler` and `ddim`, bit for bit."""
    return ddim_step(x, denoised, sigma[(None,) * x.ndim], sigma_next)


def stochastic(eta: float, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Callable) -> Tensor:
    """DDIM with eta: the host's `euler_ancestral`, bit for bit."""
    down, up = ancestral_levels(sigma, sigma_next, eta)
    if down == 0:
        return denoised
    return ddim_step(x, denoised, sigma[(None,) * x.ndim], down) + noise(sigma, sigma_next) * up


def flow_stochastic(
    eta: float, scale: float, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Callable
) -> Tensor:
    """A flow's step with eta: the host's `euler_ancestral`, bit for bit. scale: of the model's noise."""
    if sigma_next == 0:
        return denoised
    fresh = noise(sigma, sigma_next) * scale
    return flow_ancestral_step(x, denoised, sigma, sigma_next, eta=eta, noise=fresh)


def ancestral(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Callable) -> Tensor:
    """DDPM: the host's `ddpm`, bit for bit."""
    return ddpm_step(x, denoised, sigma, sigma_next, noise(sigma, sigma_next) if sigma_next > 0 else None)


def ddim_with(eta: float) -> Step:
    """The DDIM step of this eta."""
    return partial(stochastic, eta) if eta else deterministic


MODES: dict[str, Callable[[float], Step]] = {DDIM: ddim_with, DDPM: lambda eta: ancestral}


def step_of(settings: SamplerSettings, sampling: Any) -> Step:
    """The stock step that a run is made of. Raises ValueError for one that a flow-matching model has not."""
    if not host.is_flow_sampling(sampling):
        return MODES[settings.mode](settings.eta)
    if settings.mode == DDPM:
        raise ValueError(
            "mode ddpm is the posterior of a diffusion model's chain, which the connected flow-matching model has not: "
            "choose mode ddim, and eta above 0 for fresh noise."
        )
    scale = getattr(sampling, "noise_scale", 1.0)
    return partial(flow_stochastic, settings.eta, scale) if settings.eta else deterministic


# -------------------------------------------------------------------------------------------------- the sampler


@dataclass(frozen=True)
class SamplerSettings(Settings):
    """How an adapter shifts the path; see PalimpsestContextSampler for what each does to the picture."""

    mode: str = DDIM
    formula: str = AS_TRAINED
    strength: float = 1.0
    eta: float = 0.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    limit: float = 0.0
    inversion_refinements: int = 2


@dataclass(frozen=True)
class ContextSampling:
    """A host sampler function: ContextDiff's sampling (eq. 7, eq. 11), and its inversion where the levels ascend.

    Every step takes the bias of its level away, makes a stock step, and adds the bias of the next level. Refinements
    are fixed-point iterations, one model call each, of every step of an inversion.
    """

    adapter: ContextAdapter
    settings: SamplerSettings
    contextual: ClassVar[bool] = True  # as host.agreement asks

    @property
    def adds_noise(self) -> bool:
        """Whether fresh noise comes in at every step, as host.agreement asks."""
        return self.settings.mode == DDPM or self.settings.eta > 0

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
        """x (B, C, H, W) at sigmas[0] -> the latent at sigmas[-1]. Raises ValueError for what cannot be sampled."""
        from comfy.k_diffusion.sampling import default_noise_sampler, trange

        extra_args = extra_args or {}
        levels, step = sigmas.tolist(), step_of(self.settings, model.inner_model.inner_model.model_sampling)
        self.refuse_unsound(levels, step)
        bias = self.bias_of(model.inner_model, x)
        noise, rows = default_noise_sampler(x, seed=extra_args.get("seed")), x.new_ones([len(x)])
        if sigmas[0] == 0:
            sigmas = torch.cat([sigmas.new_full((1,), LOWEST), sigmas[1:]])
        x, bias = bias.start(x, model, levels[0])
        for i in trange(len(levels) - 1, disable=disable):
            denoised = model(x, sigmas[i] * rows, **extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            before, after = bias.pair(denoised, levels[i], levels[i + 1])
            to_next = partial(step, denoised=denoised, sigma=sigmas[i], sigma_next=sigmas[i + 1], noise=noise)
            reached = contextual_step(to_next, x, before, after)
            for _ in range(self.settings.inversion_refinements if levels[i + 1] > levels[i] else 0):
                clean = model(reached, sigmas[i + 1] * rows, **extra_args)
                before, after = bias.pair(clean, levels[i], levels[i + 1])
                reached = contextual_climb(x, reached, clean, before, after, sigma=levels[i], sigma_next=levels[i + 1])
            x = reached
        return x

    def bias_of(self, guider: Any, x: Tensor) -> TrajectoryBias:
        """The bias of this run, its adapter loaded. Raises ValueError where adapter, model or prompt do not fit."""
        settings, sampling = self.settings, guider.inner_model.model_sampling
        flow = host.is_flow_sampling(sampling)
        trained = self.adapter.info.get("formula", PAPER)
        level = FORMULAS[trained if settings.formula == AS_TRAINED else settings.formula][flow]
        bias = TrajectoryBias(
            adapter=self.adapter,
            model=guider.inner_model,
            prompts=(),
            level=level,
            angle=ANGLES[flow],
            window=host.Window.of(guider.model_patcher, settings.start_percent, settings.end_percent),
            top=noisiest(sampling),
            strength=settings.strength,
            limit=settings.limit,
        )
        if not settings.strength or level is no_bias:
            return bias
        if x.ndim != 4:
            raise ValueError(
                f"the context-aware sampler works on latents of pictures (batch, channels, height, width), this one "
                f"has {x.ndim} dimensions: give a clip as a batch of frames to a picture model."
            )
        self.adapter.refuse_mismatch(guider.inner_model)
        self.adapter.require_sight()
        self.adapter.load()
        prompts = prompts_of(guider)
        if len(prompts) > 1 and host.windows_part_prompts(guider.model_options, len(x)):
            raise ValueError(
                f"the context-aware sampler reads all {len(prompts)} positive prompts for every frame, and the host's "
                "context windows give each window one of them: turn split_conds_to_windows of Context Windows off, or "
                "sample with one prompt."
            )
        return replace(bias, prompts=prompts)

    def refuse_unsound(self, levels: list[float], step: Step) -> None:
        """Raise ValueError for a stochastic step up."""
        if step is deterministic:
            return
        name = DDPM if self.settings.mode == DDPM else f"eta {self.settings.eta:g}"
        if any(b > a for a, b in itertools.pairwise(levels)):
            raise ValueError(f"{name} cannot invert (the noise levels ascend): choose mode ddim and eta 0.")


def prompts_of(guider: Any) -> tuple[dict, ...]:
    """The conds that c is read from: the guider's positive ones, else (a guider of another kind) its first.

    Raises ValueError where they have no text tokens.
    """
    conds = guider.conds
    prompts = tuple(conds.get("positive") or next(iter(conds.values()), ()))
    if not prompts or any(cond.get("cross_attn") is None for cond in prompts):
        raise ValueError("the context-aware sampler reads the positive prompt, which has no text here: connect one.")
    return prompts
