"""Context-aware sampling: ContextDiff's reverse process (and its inversion) as a sampler of the host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.contextdiff import (
    ancestral_levels,
    bias_level,
    contextual_climb,
    contextual_step,
    ddpm_step,
    flow_bias_level,
    flow_noise_angle,
    noise_angle,
)
from ...kernels.ddim import ddim_step
from .adapter import ContextAdapter

PAPER, RELEASED_CODE, AS_TRAINED = "paper", "released code", "as trained"
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


def ancestral(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Callable) -> Tensor:
    """DDPM: the host's `ddpm`, bit for bit."""
    return ddpm_step(x, denoised, sigma, sigma_next, noise(sigma, sigma_next) if sigma_next > 0 else None)


def ddim_with(eta: float) -> Step:
    """The DDIM step of this eta."""
    return partial(stochastic, eta) if eta else deterministic


MODES: dict[str, Callable[[float], Step]] = {DDIM: ddim_with, DDPM: lambda eta: ancestral}


# ----------------------------------------------------------------------------------------------------- the bias


def no_bias(sigma: float) -> float:
    """The released code samples without its bias: the shifted noise is what its network learned to predict."""
    return 0.0


# formula -> B(sigma) of a diffusion model, of a flow model
FORMULAS = {PAPER: (bias_level, flow_bias_level), RELEASED_CODE: (no_bias, no_bias)}
ANGLES = noise_angle, flow_noise_angle


def active(cond: dict, sigma: float) -> bool:
    """Whether a prompt with a time range (as the host has resolved it) acts at this noise level."""
    return cond.get("timestep_end", -math.inf) <= sigma <= cond.get("timestep_start", math.inf)


def weight(cond: dict, latent: Tensor) -> Tensor:
    """Where a prompt acts, (B, 1, H, W): its strength in its area and under its mask, as the host mixes prompts."""
    height, width = latent.shape[-2:]
    rows, columns = slice(None), slice(None)
    if "area" in cond:
        h, w, top, left = cond["area"]
        rows, columns = slice(top, min(top + h, height)), slice(left, min(left + w, width))
    found = latent.new_zeros(len(latent), 1, height, width)
    found[..., rows, columns] = cond.get("strength", 1.0)
    if "mask" in cond:
        mask = cond["mask"][: len(latent)].to(latent) * cond.get("mask_strength", 1.0)
        found = found * mask.repeat(len(latent) // len(mask), 1, 1)[:, None]
    return found


def limited(context: Tensor, limit: float) -> Tensor:
    """r with each picture's root mean square at most `limit`; 0 leaves it as it is."""
    if not limit:
        return context
    size = context.pow(2).mean((1, 2, 3), keepdim=True).sqrt()
    return context * (limit / size.clamp(min=limit))


@dataclass(frozen=True)
class TrajectoryBias:
    """b(sigma) = g(sigma) B(sigma) r_phi(x0_hat, c, sigma) in one sampling run.

    prompts: the positive conds as the host has resolved them; with several, each one's r acts where the prompt does.
    level: B. angle: the level as r_phi is given it. strength g acts from noise level `first` down to `last`, and is 0
    from `top` upwards (the paper's k_T := 0).
    """

    adapter: ContextAdapter
    prompts: tuple[dict, ...]
    level: Callable[[float], float]
    angle: Callable[[float], float]
    strength: float
    first: float
    last: float
    top: float
    limit: float

    def scale(self, sigma: float) -> float:
        """g(sigma) B(sigma)."""
        inside = self.last <= sigma <= self.first and sigma < self.top
        return self.strength * self.level(sigma) if inside else 0.0

    def context(self, clean: Tensor, sigma: float, prompts: tuple[dict, ...]) -> Tensor:
        """r_phi of a picture, by the prompts that act at this level."""
        from comfy.utils import repeat_to_batch_size

        found = []
        for cond in prompts:
            text = repeat_to_batch_size(cond["cross_attn"], len(clean))
            found.append(limited(self.adapter(clean, text, self.angle(sigma)), self.limit))
        if len(found) == 1 and not {"area", "mask"} & set(prompts[0]):
            return found[0]
        weights = [weight(cond, clean) for cond in prompts]
        return sum(w * r for w, r in zip(weights, found, strict=True)) / sum(weights).clamp(min=1e-37)

    def pair(self, clean: Tensor, *sigmas: float) -> tuple[Tensor | float, ...]:
        """The biases of several levels for one x0_hat; r_phi runs once for levels at which it cannot differ."""
        known: dict[tuple, Tensor] = {}

        def at(sigma: float) -> Tensor | float:
            scale = self.scale(sigma)
            prompts = tuple(cond for cond in self.prompts if active(cond, sigma))
            if not scale or not prompts:
                return 0.0
            key = (sigma if self.adapter.config.timestep else None, *map(id, prompts))
            if key not in known:
                known[key] = self.context(clean, sigma, prompts)
            return scale * known[key]

        return tuple(at(sigma) for sigma in sigmas)

    def start(self, x: Tensor, model: Any, sigma: float) -> tuple[Tensor, TrajectoryBias]:
        """The latent to begin with, which may lack its bias, and the bias of the run that begins there.

        A picture that the host noised gets b(sigma) (eq. 1, with the true x_0). Noise over an empty latent has no
        picture that could lend it a bias: its level is the run's k_T. Where no noise was added, the latent comes from
        an earlier run or an inversion, and has its bias.
        """
        noise, picture = getattr(model, "noise", None), getattr(model, "latent_image", None)
        if not self.scale(sigma) or noise is None or not noise.any():
            return x, self
        if picture is None or not picture.any():
            return x, replace(self, top=sigma)
        return x + self.pair(picture, sigma)[0], self


# -------------------------------------------------------------------------------------------------- the sampler


@dataclass(frozen=True)
class ContextSampler:
    """A host sampler function: ContextDiff's sampling (eq. 7, eq. 11), and its inversion where the levels ascend.

    Every step takes the bias of its level away, makes a stock step, and adds the bias of the next level. start_percent
    and end_percent are shares of the model's schedule; limit caps r (0: no cap); refinements are fixed-point
    iterations, one model call each, of every step of an inversion.
    """

    adapter: ContextAdapter
    mode: str
    formula: str
    eta: float
    strength: float
    start_percent: float = 0.0
    end_percent: float = 1.0
    limit: float = 0.0
    refinements: int = 0

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
        guider = model.inner_model
        levels = sigmas.tolist()
        step = MODES[self.mode](self.eta)
        self.refuse_unsound(guider, levels, step)
        bias = self.bias_of(guider, x)
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
            for _ in range(self.refinements if levels[i + 1] > levels[i] else 0):
                clean = model(reached, sigmas[i + 1] * rows, **extra_args)
                before, after = bias.pair(clean, levels[i], levels[i + 1])
                reached = contextual_climb(x, reached, clean, before, after, levels[i], levels[i + 1])
            x = reached
        return x

    def bias_of(self, guider: Any, x: Tensor) -> TrajectoryBias:
        """The bias of this run, its adapter loaded. Raises ValueError where adapter, model or prompt do not fit."""
        import comfy.model_sampling

        sampling = guider.inner_model.model_sampling
        flow = isinstance(sampling, comfy.model_sampling.CONST)
        formula = self.adapter.info.get("formula", PAPER) if self.formula == AS_TRAINED else self.formula
        level = FORMULAS[formula][flow]
        bias = TrajectoryBias(
            self.adapter,
            (),
            level,
            ANGLES[flow],
            self.strength,
            float(sampling.percent_to_sigma(self.start_percent)),
            float(sampling.percent_to_sigma(self.end_percent)),
            float(sampling.sigma_max) * (1.0 - 1e-5),
            self.limit,
        )
        if not self.strength or level is no_bias:
            return bias
        if x.ndim != 4:
            raise ValueError(
                f"the context-aware sampler works on latents of pictures (batch, channels, height, width), this one "
                f"has {x.ndim} dimensions: give a clip as a batch of frames to a picture model."
            )
        self.adapter.refuse_mismatch(guider.inner_model)
        self.adapter.load()
        return replace(bias, prompts=prompts_of(guider))

    def refuse_unsound(self, guider: Any, levels: list[float], step: Step) -> None:
        """Raise ValueError for a stochastic step up, or on a flow model."""
        import comfy.model_sampling

        if step is deterministic:
            return
        name = self.mode if self.mode == DDPM else f"eta {self.eta:g}"
        if isinstance(guider.inner_model.model_sampling, comfy.model_sampling.CONST):
            raise ValueError(
                f"{name} adds noise as diffusion models do, the connected model is a flow-matching one: choose mode "
                "ddim and eta 0."
            )
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
