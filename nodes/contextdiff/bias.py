"""The bias of ContextDiff's trajectories in one sampling run: what r_phi sees, where and when it acts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...kernels.contextdiff import bias_level, flow_bias_level, flow_noise_angle, noise_angle
from .. import host
from .adapter import ContextAdapter
from .condition import told

PAPER, RELEASED_CODE = "paper", "released code"


def no_bias(sigma: float) -> float:
    """The released code samples without its bias: the shifted noise is what its network learned to predict."""
    return 0.0


# formula -> B(sigma) of a diffusion model, of a flow model
FORMULAS = {PAPER: (bias_level, flow_bias_level), RELEASED_CODE: (no_bias, no_bias)}
ANGLES = noise_angle, flow_noise_angle


def noisiest(sampling: Any) -> float:
    """The level from which on a diffusion model has no bias (k_T := 0): its schedule's highest, but for rounding."""
    return float(sampling.sigma_max) * (1.0 - 1e-5)


def in_its_range(cond: dict, sigma: float) -> bool:
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

    model: the host's, in whose scale latents are. prompts: the positive conds as the host has resolved them; with
    several, each one's r acts where the prompt does. level: B. angle: the level as r_phi is given it. strength g acts
    within the window, and is 0 from `top` upwards (the paper's k_T := 0). limit caps r (0: no cap).
    """

    adapter: ContextAdapter
    model: Any
    prompts: tuple[dict, ...]
    level: Callable[[float], float]
    angle: Callable[[float], float]
    window: host.Window
    top: float
    strength: float
    limit: float

    def scale(self, sigma: float) -> float:
        """g(sigma) B(sigma)."""
        inside = self.window.always or sigma in self.window
        return self.strength * self.level(sigma) if inside and sigma < self.top else 0.0

    def context(self, clean: Tensor, picture: Tensor | None, sigma: float, prompts: tuple[dict, ...]) -> Tensor:
        """r_phi of a latent and what is seen of it, by the prompts that act at this level."""
        from comfy.utils import repeat_to_batch_size

        found = []
        for cond in prompts:
            text = repeat_to_batch_size(told(self.adapter.config, cond), len(clean))
            found.append(limited(self.adapter(clean, text, self.angle(sigma), picture), self.limit))
        if len(found) == 1 and not {"area", "mask"} & set(prompts[0]):
            return found[0]
        weights = [weight(cond, clean) for cond in prompts]
        return sum(w * r for w, r in zip(weights, found, strict=True)) / sum(weights).clamp(min=1e-37)

    def pair(self, clean: Tensor, *sigmas: float) -> tuple[Tensor | float, ...]:
        """The biases of several levels for one x0_hat; r_phi runs once for levels at which it cannot differ."""
        known: dict[tuple, Tensor] = {}
        seen: list[Tensor | None] = []

        def at(sigma: float) -> Tensor | float:
            scale = self.scale(sigma)
            prompts = tuple(cond for cond in self.prompts if in_its_range(cond, sigma))
            if not scale or not prompts:
                return 0.0
            key = (sigma if self.adapter.config.timestep else None, *map(id, prompts))
            if key not in known:
                seen[:] = seen or [self.adapter.seen(clean, self.model)]
                known[key] = self.context(clean, seen[0], sigma, prompts)
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
