"""The training losses of diffusion models, in the host's variables x = x_0 + sigma eps and D = the predicted x_0.

A network that is asked for eps or v is compared by what it was asked for; both errors are the error of x_0 by a factor
that depends on the noise level alone, so that D is all that is needed and every patch on the model counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def noise_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, where: Tensor | None = None) -> Tensor:
    """|eps_hat - eps|^2 of each picture, averaged over its elements.        arXiv:2406.18790, section 2.1

    eps_hat = (x - D) / sigma, eps = (x - x_0) / sigma, so eps_hat - eps = (x_0 - D) / sigma.
    denoised D, clean x_0 (B, C, H, W), sigma (B,) above 0, where (B, 1, H, W) -> (B,) in float32.
    """
    return picture_error(denoised, clean, where) / sigma.float() ** 2


def velocity_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, where: Tensor | None = None) -> Tensor:
    """|v_hat - v|^2 of each picture, averaged over its elements.            arXiv:2202.00512, appendix D

    v = (eps - sigma x_0) / sqrt(1 + sigma^2), as the host has it, so
    |v_hat - v|^2 = |D - x_0|^2 (1 + sigma^2) / sigma^2.
    denoised D, clean x_0 (B, C, H, W), sigma (B,) above 0, where (B, 1, H, W) -> (B,) in float32.
    """
    level = sigma.float() ** 2
    return picture_error(denoised, clean, where) * (1.0 + level) / level


def picture_error(denoised: Tensor, clean: Tensor, where: Tensor | None = None) -> Tensor:
    """|D - x_0|^2 of each picture, averaged over its elements: (B, C, H, W) twice -> (B,) in float32.

    where (B, 1, H, W), 0 and more, not all 0: the weight of each place in the mean; None: all alike.
    """
    error = (denoised.float() - clean.float()).pow(2)
    if where is None:
        return error.flatten(1).mean(1)
    return (error.mean(1, keepdim=True) * where).flatten(1).sum(1) / where.flatten(1).sum(1)


def spread_levels(draws: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Places in 0..1 of the schedule, one for each row of a batch, which together cover it evenly.

    t_r = (r + u_r) / B: each is uniform where rows are in random order, and no batch is all noise or all clean.
    draws u (R,) in 0..1, rows r (R,) of the whole batch of B -> (R,).
    """
    return (rows + draws) / batch
