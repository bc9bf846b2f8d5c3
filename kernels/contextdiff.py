"""ContextDiff (arXiv:2402.16627): forward and reverse trajectories that a picture-and-text context shifts.

The paper's variables: z_t = sqrt(abar_t) x_0 + b_t + sqrt(1 - abar_t) eps with the bias b_t = k_t r, where
r = r_phi(x_0, c, t) is the adapter's output, of x_0's shape. A level is given as signal = sqrt(abar).

The host's variables: x = z / sqrt(abar) = x_0 + B(sigma) r + sigma eps, sigma^2 = (1 - abar) / abar, so that
B = k_t / sqrt(abar) = 1 - sqrt(abar). In both, z_t - b_t is an ordinary noised picture: every contextualised step takes
the bias of its level away, does the stock step, and adds the bias of the next level. That makes the stock step the
exact case r = 0, bit for bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .ddim import predicted_noise

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

RELEASED_CODE_SHIFT = 0.018125  # what the authors' code multiplies r with, in place of k_t


# ------------------------------------------------------------------------------------------- in the paper's variables


def bias_scale(signal: float) -> float:
    """k_t = sqrt(abar_t) (1 - sqrt(abar_t)), under eq. 1. At most 1/4 (signal 1/2), 0 for a clean picture.

    On Stable Diffusion's schedule the most is at t = 520 of 0 to 999; at t = 999 it is 0.064.

    The paper sets k_T := 0 at its noisiest level; that is the caller's to do (k there is small, but not 0).
    """
    return signal * (1.0 - signal)


def contextual_forward(clean: Tensor, context: Tensor, noise: Tensor, signal: float) -> Tensor:
    """A draw from q(z_t | x_0, c) = N(sqrt(abar) x_0 + k_t r, (1 - abar) I).                         eq. 1, eq. 8

    clean x_0, context r and noise eps of one shape -> that shape.
    """
    return signal * clean + bias_scale(signal) * context + math.sqrt(1.0 - signal * signal) * noise


def transition_mean(z: Tensor, bias: Tensor, bias_before: Tensor, signal: float, signal_before: float) -> Tensor:
    """Mean of q(z_t | z_{t-1}, x_0, c); its variance is beta_t = 1 - alpha_t, alpha = abar_t / abar_{t-1}.     eq. 2

    z = z_{t-1}, bias = b_t, bias_before = b_{t-1}; signal = sqrt(abar_t), signal_before = sqrt(abar_{t-1}).
    """
    root_alpha = signal / signal_before
    return root_alpha * z + bias - root_alpha * bias_before


def posterior_mean(
    z: Tensor, clean: Tensor, bias: Tensor, bias_next: Tensor, signal: float, signal_next: float
) -> Tensor:
    """Mean of q(z_{t-1} | z_t, x_0, c) (eq. 3), which is the DDPM mean (eq. 7) where clean is the predicted x_0.

    sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) (z_t - b_t) + b_{t-1}
    z = z_t, bias = b_t, bias_next = b_{t-1}; signal = sqrt(abar_t) < 1, signal_next = sqrt(abar_{t-1}).
    """
    root_alpha, rest = signal / signal_next, 1.0 - signal * signal
    from_clean = signal_next * (1.0 - root_alpha * root_alpha) / rest
    from_noisy = root_alpha * (1.0 - signal_next * signal_next) / rest
    return from_clean * clean + from_noisy * (z - bias) + bias_next


def posterior_variance(signal: float, signal_next: float) -> float:
    """Variance of eq. 3 and eq. 7: (1 - abar_{t-1}) beta_t / (1 - abar_t)."""
    beta = 1.0 - (signal / signal_next) ** 2
    return (1.0 - signal_next * signal_next) * beta / (1.0 - signal * signal)


def contextual_ddim(
    z: Tensor, clean: Tensor, bias: Tensor, bias_next: Tensor, signal: float, signal_next: float, deviation: float = 0.0
) -> Tensor:
    """The DDIM update, down or up.                                              eq. 11; its mean with eq. 9 and 10

    z~ = sqrt(abar') x_0 + sqrt(1 - abar' - s^2) (z - sqrt(abar) x_0) / sqrt(1 - abar)
    z' = z~ - b sqrt(1 - abar' - s^2) / sqrt(1 - abar) + b'
    deviation s is the sigma_t of eq. 9, the deviation of the noise to be added; 0 is eq. 11. With the two levels
    changed over, and the same x_0 and biases, it inverts itself: the paper's inversion, which it does not print.
    """
    ratio = math.sqrt((1.0 - signal_next * signal_next - deviation * deviation) / (1.0 - signal * signal))
    return signal_next * clean + ratio * (z - signal * clean) - ratio * bias + bias_next


# --------------------------------------------------------------------------------------------- in the host's variables


def bias_level(sigma: float) -> float:
    """B(sigma) = k_t / sqrt(abar_t) = 1 - 1 / sqrt(1 + sigma^2), written without the difference that loses digits."""
    root = math.sqrt(1.0 + sigma * sigma)
    return sigma * sigma / (root * (1.0 + root))


def noise_angle(sigma: float) -> float:
    """A noise level as a number from 0 (clean) to 1 (pure noise), the t that r_phi is given: 2/pi atan(sigma).

    The share of a quarter turn from signal to noise, so that it means the same for every schedule and family.
    """
    return math.atan(sigma) * 2.0 / math.pi


def contextual_noised(clean: Tensor, bias: Tensor | float, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """A draw from q(x | x_0, c) in the host's variables: x_0 + B r + sigma eps.                               eq. 1

    bias = B(sigma) r. clean, noise (B, C, H, W); sigma a number or (B, 1, 1, 1).
    """
    return clean + bias + sigma * noise


def ancestral_levels(sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(level to step down to, deviation of the noise to add) of a DDIM step with eta.   arXiv:2010.02502, eq. 12 and 16

    up = eta sigma' sqrt(sigma^2 - sigma'^2) / sigma, down = sqrt(sigma'^2 - up^2): the s of eq. 9 divided by
    sqrt(abar'). eta 1 has DDPM's variance. 0-d tensors, in the order of the host's own arithmetic.
    """
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def ddpm_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None) -> Tensor:
    """One DDPM step (arXiv:2006.11239, eq. 11) in the host's variables; eq. 7 at r = 0.

    z' = (z - (1 - alpha) eps / sqrt(1 - abar)) / sqrt(alpha) + sqrt((1 - abar') (1 - alpha) / (1 - abar)) noise
    x, denoised, noise (B, C, H, W); levels 0-d tensors, in the order of the host's own arithmetic. noise None adds
    none: the mean, and the last step.
    """
    abar, abar_next = 1 / (sigma * sigma + 1), 1 / (sigma_next * sigma_next + 1)
    alpha = abar / abar_next
    eps, z = predicted_noise(x, denoised, sigma), x / (1.0 + sigma**2.0).sqrt()
    z_next = (1.0 / alpha).sqrt() * (z - (1 - alpha) * eps / (1 - abar).sqrt())
    if noise is not None:
        z_next = z_next + ((1 - alpha) * (1.0 - abar_next) / (1.0 - abar)).sqrt() * noise
    return z_next * (1.0 + sigma_next**2.0).sqrt()


def contextual_step(
    step: Callable[[Tensor], Tensor], x: Tensor, bias: Tensor | float, bias_next: Tensor | float
) -> Tensor:
    """A stock step made contextual: x' = step(x - B(sigma) r) + B(sigma') r'.

    With step(y) = y + (sigma' - sigma) (y - x_0) / sigma (`ddim_step`) this is eq. 11: d = (x - x_0 - B r) / sigma,
    x' = x_0 + B' r' + sigma' d. With `ddpm_step` it is eq. 7. bias = B(sigma) r(x_0, c, t), bias_next = B(sigma')
    r(x_0, c, t-1), of x's shape, or 0.0 where there is none, which leaves the step as it was to the last bit.
    """
    return step(x - bias) + bias_next


def contextual_climb(
    x: Tensor, x_next: Tensor, clean_next: Tensor, bias: Tensor | float, bias_next: Tensor | float, sigma, sigma_next
) -> Tensor:
    """One fixed-point iteration for the latent from which eq. 11 steps down to x: the inversion solved, not estimated.

    The step down from x' reads x = x' - b' + (sigma - sigma') d, d = (x' - b' - x_0) / sigma', plus b; all of it made
    at x'. Solved for the first x': x' = x - b + (sigma' - sigma) d(x') + b'. Sampling undoes its fixed point exactly,
    from sigma = 0 too.

    x at sigma, x_next the guess of x' at sigma_next, clean_next the x_0 the model sees in it; biases made from
    clean_next, at sigma and sigma_next.
    """
    return x - bias + (sigma_next - sigma) * predicted_noise(x_next - bias_next, clean_next, sigma_next) + bias_next


# ------------------------------------------------------------------------------------------------ flow-matching models


def flow_bias_level(sigma: float) -> float:
    """The bias of a flow model, x = (1 - s) x_0 + b + s noise: b = s (1 - s) r. Derived here, not in the paper.

    The paper's marginal (eq. 8) has the form a x_0 + k r + n eps with signal a and noise n. That eq. 11 leads from one
    level's marginal to the next one's rests on x' = a' x_0 + b' + n' (x - a x_0 - b) / n alone, where the bracket is
    n eps, and nowhere on a^2 + n^2 = 1. So a = 1 - s, n = s and the same k = a (1 - a) = s (1 - s) give

        x' = (1 - s') x_0 + (s'/s) (x - (1 - s) x_0 - b) + b' = y + (s' - s) (y - x_0) / s + b',   y = x - b

    which is `contextual_step` around the stock Euler step. k is 0 at pure noise by itself here. Eq. 7 is not carried
    over: it is the posterior of the chain of eq. 2, and flow models have no such chain.
    """
    return sigma * (1.0 - sigma)


def flow_ancestral_step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, noise: Tensor
) -> Tensor:
    """A flow's Euler step to a lower level and fresh noise up to the next one; around r = 0 of flow_bias_level.

        d = s' (1 + eta (s'/s - 1)),   y = (d/s) x + (1 - d/s) x_0,   x' = (1 - s')/(1 - d) y + e noise
        e^2 = s'^2 - d^2 (1 - s')^2 / (1 - d)^2

    With x = (1 - s) x_0 + s eps that is x' = (1 - s') x_0 + sqrt(s'^2 - e^2) eps + e noise: the marginal is kept, also
    between two biases (`contextual_step`). eta 0 is Euler, eta 1 takes the most fresh noise. x, denoised, noise of one
    shape; levels 0-d tensors, s' above 0, in the order of the host's own arithmetic.
    """
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    signal, signal_down, ratio = 1 - sigma_next, 1 - down, down / sigma
    fresh = (sigma_next**2 - down**2 * signal**2 / signal_down**2) ** 0.5
    return (signal / signal_down) * (ratio * x + (1 - ratio) * denoised) + noise * fresh


def flow_noise_angle(sigma: float) -> float:
    """noise_angle of a flow level s: signal 1 - s, noise s."""
    return math.atan2(sigma, 1.0 - sigma) * 2.0 / math.pi


# ------------------------------------------------------------------------------------------------------------ training


def flow_noised(clean: Tensor, bias: Tensor | float, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """A draw from a flow's q(x_s | x_0, c): (1 - s) x_0 + b + s eps, b = s (1 - s) r: eq. 1 by flow_bias_level.

    clean, bias, noise (B, C, H, W); sigma a number or (B, 1, 1, 1).
    """
    return (1.0 - sigma) * clean + bias + sigma * noise


def flow_weight(sigma: float, limit: float = 5.0) -> float:
    """lambda of a flow level s: min(1 / s^2, limit). Derived here, not in the paper.

    A flow's network gives the velocity v = (x - f) / s, and f = x_0 asks for v* = (x - x_0) / s = eps - x_0 + (1 - s) r
    of the shifted x. So |v - v*|^2 = |f - x_0|^2 / s^2: unlimited, eq. 6 is the loss that such models are trained by,
    as snr_weight makes it the eps loss of a diffusion model. The limit keeps levels near the picture from ruling.
    """
    return min(1.0 / (sigma * sigma), limit)


def snr_weight(sigma: float, limit: float = 5.0) -> float:
    """lambda_t = min(SNR, limit), SNR = abar / (1 - abar) = 1 / sigma^2: eq. 6's weight, which the paper leaves open.

    Unlimited it turns the x_0 loss into the eps loss; the limit is Min-SNR's (arXiv:2303.09556).
    """
    return min(1.0 / (sigma * sigma), limit)


def context_loss(denoised: Tensor, clean: Tensor, weight: Tensor | float) -> Tensor:
    """lambda_t || f_theta(x_t, c, t) - x_0 ||^2 per picture, averaged over its elements.                      eq. 6

    denoised, clean (B, C, H, W); weight a number or (B,). Returns (B,) in float32.
    """
    return weight * (denoised.float() - clean.float()).pow(2).flatten(1).mean(1)


def shifted_noise(noise: Tensor, context: Tensor) -> Tensor:
    """The noise of the authors' released training code: eps' = eps + 0.018125 r, x = x_0 + sigma eps'. Not the paper's.

    The network learns eps', so that x - sigma eps' is x_0 itself and sampling is plain DDIM. Eq. 11 agrees: with
    B = 0.018125 sigma and an r that does not depend on t, the bias it takes away is the one it adds.
    """
    return noise + RELEASED_CODE_SHIFT * context
