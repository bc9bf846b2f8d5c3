"""Low-rank changes of weights (LoRA, arXiv:2106.09685), and how a training of them weighs and paces its steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CONSTANT, LINEAR, COSINE = "constant", "linear", "cosine with restarts"
SCHEDULES = (COSINE, LINEAR, CONSTANT)
EVEN, DEBIASED, PICTURE = "all levels alike", "debiased", "picture"
LOSS_WEIGHTS = (EVEN, DEBIASED, PICTURE)


def low_rank_sum(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """W + scale up down, scale = alpha / rank.                                      arXiv:2106.09685, section 4.1

    weight (outputs, ...) of any number of dimensions, up (outputs, rank), down (rank, inputs), inputs the product of
    the weight's other dimensions -> weight's shape and dtype. The sum is taken in the factors' precision and rounded
    once, as the host does when it loads a file.
    """
    return (weight.to(up.dtype) + scale * (up @ down).view(weight.shape)).to(weight.dtype)


def min_snr_weight(sigma: Tensor, limit: float, velocity: bool = False) -> Tensor:
    """min(SNR, limit) / SNR for a loss on the noise, min(SNR, limit) / (SNR + 1) for one on v.        arXiv:2303.09556

    SNR = 1 / sigma^2 in the host's variables. sigma (B,) above 0 -> (B,) in float32; a limit of 0 weighs all alike.
    """
    ratio = sigma.float() ** -2
    if limit == 0:
        return ratio / ratio
    return ratio.clamp(max=limit) / (ratio + 1.0 if velocity else ratio)


def level_weight(sigma: Tensor, kind: str = EVEN, velocity: bool = False) -> Tensor:
    """What each noise level counts in a loss on the noise, in the host's variables, where SNR = 1 / sigma^2.

    EVEN: 1, as models are trained. DEBIASED: 1 / sqrt(SNR) = sigma.                                 arXiv:2310.08442
    PICTURE: 1 / SNR = sigma^2, with which the loss is |D - x_0|^2, the predicted picture's error.
    A loss on v has (1 + sigma^2) times the error of one on the noise, so that the last two are divided by that: D's
    error counts the same. (Programs in use take 1 / (SNR + 1) for a debiased v, which is PICTURE here.)
    sigma (B,) above 0 -> (B,) in float32.
    """
    level = sigma.float()
    if kind == EVEN:
        return torch.ones_like(level)
    weight = level if kind == DEBIASED else level**2
    return weight / (1.0 + level**2) if velocity else weight


def with_offset(noise: Tensor, draws: Tensor, offset: float) -> Tensor:
    """eps + offset * a draw for each picture and channel: very dark and very bright pictures can be learned.

    noise (B, C, H, W), draws (B, C) of a normal distribution -> noise's shape. Departure from the noise that models are
    trained with (N. Guttenberg, "Diffusion with offset noise", 2023); 0 leaves it as it is.
    """
    return noise + offset * draws[:, :, None, None]


def rate_share(step: int, steps: int, *, schedule: str = COSINE, warm_up: int = 0, cycles: int = 1) -> float:
    """The share of the learning rate in step `step` of 0 .. steps - 1.

    The first `warm_up` steps rise in a line to 1. With p in 0..1 over the others: 1; 1 - p; or
    (1 + cos(pi (cycles p mod 1))) / 2, a cosine that begins anew `cycles` times.         arXiv:1608.03983, eq. 5
    """
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    done = (step - warm_up) / max(1, steps - warm_up)
    if schedule == CONSTANT:
        return 1.0
    if schedule == LINEAR:
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * (cycles * done % 1.0)))
