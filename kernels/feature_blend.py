"""Feature blending: the source's features and latents flow back into an edit where they should.

Enhanced MGIE (founding paper), section 3.3, eq. 1:       F = alpha F_edit + (1 - alpha) F_source, one alpha a layer
PFB-Diff (arXiv:2306.16894), progressive feature blending: F = m F_edit + (1 - m) F_source, one mask for all layers
Both are one line with a weight: w = alpha_in m + alpha_out (1 - m), F = w F_edit + (1 - w) F_source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def blend_weight(mask: Tensor | None, inside: Tensor | float, outside: Tensor | float) -> Tensor | float:
    """w = alpha_in m + alpha_out (1 - m): the edit's share of a feature, inside and outside of a mask.

    mask m in 0..1, any shape; None is white all over, which leaves alpha_in.
    """
    return inside if mask is None else outside + (inside - outside) * mask


def blend(edit: Tensor, source: Tensor, weight: Tensor | float) -> Tensor:
    """F = w F_edit + (1 - w) F_source                                  founding paper, eq. 1; PFB-Diff

    edit and source of one dtype, and weight, broadcast against each other -> edit's dtype. w = 1 gives `edit` and w = 0
    `source` back, bit for bit. A weight of a wider dtype, as one that is being learned, is applied in that. The same
    line blends latents, with the mask as the weight.
    """
    if isinstance(weight, torch.Tensor) and weight.dtype != edit.dtype:
        wide = torch.promote_types(weight.dtype, edit.dtype)
        return torch.lerp(source.to(wide), edit.to(wide), weight.to(wide)).to(edit.dtype)
    return torch.lerp(source, edit, weight)


def largest_near(x: Tensor, radius: int, dim: int) -> Tensor:
    """y_i = max x_j, |j - i| <= radius, along one dimension of x; bit for bit max_pool's.

    The reach grows threefold a turn, so that a pixel costs log(radius); a square's maximum is that of columns, then of
    rows. Any shape, dtype and device.
    """
    places, reach = torch.arange(x.shape[dim], device=x.device), 0
    while reach < radius:
        step = min(radius - reach, 2 * reach + 1)
        before, behind = ((places + way).clamp(0, len(places) - 1) for way in (-step, step))
        x = torch.maximum(torch.maximum(x, x.index_select(dim, before)), x.index_select(dim, behind))
        reach += step
    return x


def between_levels(x: Tensor, x_next: Tensor, sigma: float, sigma_next: float, level: float) -> Tensor:
    """A latent at `level` on the straight line through x at sigma and x_next at sigma_next.

    It is the path on which deterministic DDIM walks between the two (x' = x + (sigma' - sigma) eps, one eps a step).
    Raises ValueError where the two levels are one.
    """
    if sigma == sigma_next:
        raise ValueError(f"between_levels: both latents are at sigma {sigma:g}")
    return torch.lerp(x_next, x, (level - sigma_next) / (sigma - sigma_next))


def straight_line_denoised(x: Tensor, x_next: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The x_0 with which one DDIM (Euler) step carries x at sigma exactly to x_next at sigma_next.

    x_0 = x - sigma eps,  eps = (x' - x) / (sigma' - sigma)
    which is where the straight line through both meets sigma = 0; at sigma' = 0 it is x' itself.
    """
    return between_levels(x, x_next, sigma, sigma_next, 0.0)


def departure(x: Tensor, path: Tensor, weight: Tensor) -> Tensor:
    """How far a latent is from a path, root mean square over a region: sqrt(sum w (x - p)^2 / (C sum w)).

    x (B, C, ...), path (B or 1, C, ...), weight w (B or 1, 1, ...) in 0..1 over the same H, W or F, H, W -> (B,) in
    float32; 0 where w is.
    """
    squares = ((x.float() - path.float()).pow(2).mean(1, keepdim=True) * weight).flatten(1).sum(1)
    return (squares / weight.float().flatten(1).sum(1).clamp_min(1e-12)).sqrt()


def farthest_departure(sigma: float, sigma_since: float) -> float:
    """How far from the source's path a latent at sigma may be that was on it at sigma_since: max(s, s_0 - s) / 4.

    Two deterministic walks part by |eps - eps'| (s_0 - s), the picture's change over its noise; noise that a sampler
    adds anew is of the size of s itself. Ours: measured on the pocket model, edits stay below 0.05 (s_0 - s), and
    ancestral steps go beyond 0.5 s.
    """
    return max(sigma, sigma_since - sigma) / 4


def tuning_losses(
    denoised: Tensor, source: Tensor, edit: Tensor, outside: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor]:
    """How far a blended prediction is from the source outside, and from the unblended edit inside; two numbers.

    L_rec  = sum outside (D - S)^2 / sum outside (E - S)^2
    L_edit = sum inside (D - E)^2 / sum inside (E - S)^2
    so that (L_rec, L_edit) is (1, 0) for the edit as it is and (0, 1) for the source. The founding paper names a
    reconstruction loss and no more; on its own it is least at alpha = 0, where nothing is left of the edit.

    denoised D, source S, edit E (B, C, H, W); outside and inside (B or 1, 1, H, W) weights in 0..1.
    """
    change = (edit.float() - source.float()).pow(2)

    def share(other: Tensor, where: Tensor) -> Tensor:
        return ((denoised.float() - other.float()).pow(2) * where).sum() / (change * where).sum().clamp_min(1e-12)

    return share(source, outside), share(edit, inside)


def pair_loss(denoised: Tensor, edited: Tensor, source: Tensor) -> Tensor:
    """How far a blended prediction is from the true edited picture; a number, the mean over pictures.

    L_rec = sum (D - T)^2 / sum (S - T)^2                                founding paper, section 3.5
    "The reconstruction loss ensures that the edited image is similar to the ground-truth edited image". Ours: the
    division, so that pairs count alike: 1 is a prediction as far off as the source, 0 the edited picture.

    denoised D, edited T, source S (B, C, H, W); a pair of two equal pictures counts by its own size alone.
    """
    apart, change = ((other.float() - edited.float()).pow(2).flatten(1).sum(1) for other in (denoised, source))
    return (apart / change.clamp_min(1e-3 * edited[0].numel())).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a patch discriminator: E max(0, 1 - D(real)) + E max(0, 1 + D(fake))  (arXiv:1705.02894).

    The founding paper says "adversarial loss" and not which; the hinge needs no balance at small batches.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """The blended prediction's side of the hinge game: - E D(fake)."""
    return -fake.mean()
