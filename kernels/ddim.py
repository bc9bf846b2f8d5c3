"""Deterministic DDIM (arXiv:2010.02502, eq. 12 at eta = 0) in the host's coordinates.

Papers write z_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. The host's samplers carry x = z / sqrt(abar), so that
x = x_0 + sigma eps with sigma^2 = (1 - abar) / abar. In x one DDIM step is one Euler step, for every prediction type
(eps, v, EDM, zero-terminal-SNR), because only the denoised picture x_0 enters.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def signal_level(sigma: float) -> float:
    """sqrt(abar) of a noise level: 1 / sqrt(1 + sigma^2). z = signal_level(sigma) * x."""
    return 1.0 / math.sqrt(1.0 + sigma * sigma)


def predicted_noise(x: Tensor, denoised: Tensor, sigma: Tensor | float) -> Tensor:
    """eps = (x - x_0) / sigma, from x = x_0 + sigma eps. Raises ValueError at sigma <= 0, where eps has no meaning.

    sigma is a number, or (B, 1, 1, 1), which is not checked: reading it would stop a GPU's queue.
    """
    if isinstance(sigma, (int, float)) and not sigma > 0.0:
        raise ValueError(f"predicted_noise: sigma must be above 0, got {sigma}")
    return (x - denoised) / sigma


def ddim_step(x: Tensor, denoised: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """One step of the deterministic DDIM solver from noise level sigma to sigma_next, up or down.

    x' = x + (sigma' - sigma) eps,   eps = (x - x_0) / sigma
    In the paper's z this is z' = sqrt(abar'/abar) z + sqrt(abar') (sqrt(1/abar' - 1) - sqrt(1/abar - 1)) eps, which is
    eq. 4 of KV Inversion (arXiv:2309.16608) with the factor sqrt(abar') that its print leaves out.

    x, denoised (B, C, H, W), same shape -> same shape and dtype; levels as numbers, or (B, 1, 1, 1) of x's dtype where
    every row has its own. Raises ValueError at a number sigma <= 0.
    """
    return x + (sigma_next - sigma) * predicted_noise(x, denoised, sigma)


def rescale_to_level(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The same z seen at another noise level: x' = x sqrt(1 + sigma'^2) / sqrt(1 + sigma^2).

    DDIM inversion asks the network for eps at the level it climbs to, with the latent it still has ("eps at t + 1 from
    z_t", as published inversion code does). In x that latent must be scaled as here, or the network sees it too small.
    """
    return x * (signal_level(sigma) / signal_level(sigma_next))
