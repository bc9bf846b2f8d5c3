"""Where words act: the share of a layer's cross-attention that goes to them, as maps, masks and a leakage figure.

DAAM (arXiv:2210.04885) averages these shares over heads, layers and steps; so do we.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def attention_mass(query: Tensor, key: Tensor, positions: Sequence[Sequence[int]], heads: int) -> Tensor:
    """Share of every query's attention that goes to each word, averaged over heads.

    m_w = mean_h sum_{j in w} A_h[:, j],  A_h = softmax(Q_h K_h^T / sqrt(d))

    query (B, N, H*D), key (B, M, H*D), positions: the keys of each of W words -> (B, N, W) float32 in 0..1. Holds all
    of A, (B, H, N, M): what the recorder, which uses indicator_values, is tested against.
    """
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1).float().mean(1)
    return torch.stack([weights[..., list(word)].sum(-1) for word in positions], -1)


def indicator_values(positions: Sequence[Sequence[int]], keys: int, heads: int, width: int) -> Tensor:
    """Values V (M, H*D) for which attention itself returns the mass of up to D words: V[j, h*D + w] = [j in w].

    sum_j A_h[i, j] V_h[j, w] = sum_{j in w} A_h[i, j], so that the host's fused attention never writes A down.
    Raises ValueError for more words than a head has channels, D, and for a position outside the M keys.
    """
    if len(positions) > width:
        raise ValueError(f"indicator_values: {len(positions)} words do not fit into heads of {width} channels")
    if any(not 0 <= position < keys for word in positions for position in word):
        raise ValueError(f"indicator_values: positions {positions} reach outside of {keys} keys")
    values = torch.zeros(keys, heads, width)
    for word, rows in enumerate(positions):
        values[list(rows), :, word] = 1.0
    return values.flatten(1)


def mass_of_output(output: Tensor, words: int, heads: int) -> Tensor:
    """attention_mass from what attention made of indicator_values: (B, N, H*D) -> (B, N, W) float32."""
    return output.unflatten(-1, (heads, -1))[..., :words].float().mean(2)


def averaged(levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean of maps of several resolutions, each (B, W, h, w), at `size`: (B, W, H, W), never below 0."""
    grown = [F.interpolate(level, size=size, mode="bicubic", align_corners=False).clamp_min(0) for level in levels]
    return torch.stack(grown).mean(0)


def by_itself(mass: Tensor) -> Tensor:
    """Every map (B, W, H, W) stretched to 0..1 by its own least and largest value; a flat map gives 0."""
    low, high = mass.amin((-2, -1), keepdim=True), mass.amax((-2, -1), keepdim=True)
    return (mass - low) / (high - low).clamp_min(torch.finfo(mass.dtype).tiny)


def against_each_other(mass: Tensor) -> Tensor:
    """Every word's share of all W words' mass at a place, (B, W, H, W): the words compete and add up to 1.

    Each word is first divided by its mean, or the word that draws most attention would win everywhere.
    """
    relative = mass / mass.mean((-2, -1), keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    return relative / relative.sum(1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)


def as_measured(mass: Tensor) -> Tensor:
    """The mass itself, 0..1: small numbers, for most of the attention goes to the start token."""
    return mass


def leakage(mass: Tensor, mask: Tensor) -> Tensor:
    """Share of a word's attention mass that lies outside its mask: sum m_w (1 - mask) / sum m_w.

    mass (B, W, H, W) as measured, mask (B or 1, 1, H, W) in 0..1 -> (B, W) in 0..1; 0 is no leakage, and a word that
    looks everywhere alike has the area outside. nan for a word without any mass.
    """
    return (mass * (1 - mask)).sum((-2, -1)) / mass.sum((-2, -1))


def overlap(found: Tensor, drawn: Tensor) -> Tensor:
    """Intersection over union of two masks: sum min(a, b) / sum max(a, b), 1 where they are the same.

    found (B, H, W), drawn (B or 1, H, W) in 0..1 -> (B,); soft edges count by their value, nan where both are black.
    """
    found, drawn = found.float(), drawn.float().to(found.device)
    both, either = torch.minimum(found, drawn), torch.maximum(found, drawn)
    return both.sum((-2, -1)) / either.sum((-2, -1))


def otsu(values: Tensor, bins: int = 256) -> Tensor:
    """The threshold that parts values in 0..1 best into two groups (largest variance between them; Otsu 1979).

    values (..., H, W) -> (...) thresholds, in the middle of equally good ones.
    """
    flat = values.flatten(-2).clamp(0, 1)
    index = (flat * bins).long().clamp_max(bins - 1)
    share = torch.zeros(*flat.shape[:-1], bins, dtype=torch.float64, device=flat.device)
    share = share.scatter_add(-1, index, torch.ones_like(index, dtype=torch.float64)) / flat.shape[-1]
    centres = (torch.arange(bins, dtype=torch.float64, device=flat.device) + 0.5) / bins
    below, moment = share.cumsum(-1)[..., :-1], (share * centres).cumsum(-1)
    total, moment = moment[..., -1:], moment[..., :-1]
    between = (total * below - moment).square() / (below * (1 - below)).clamp_min(1e-12)
    best = between >= between.amax(-1, keepdim=True) * (1 - 1e-9)
    edges = torch.arange(1, bins, dtype=torch.float64, device=flat.device) / bins
    return ((best * edges).sum(-1) / best.sum(-1)).to(values.dtype)


def cleaned(mask: Tensor, radius: int) -> Tensor:
    """A binary mask (..., H, W) without specks and holes up to 2 radius across: opened, then closed, by a square."""
    if radius == 0:
        return mask
    planes = mask.reshape(-1, 1, *mask.shape[-2:])

    def grow(planes: Tensor) -> Tensor:
        return F.max_pool2d(planes, 2 * radius + 1, 1, radius)

    def shrink(planes: Tensor) -> Tensor:
        return -F.max_pool2d(-planes, 2 * radius + 1, 1, radius)

    return shrink(grow(grow(shrink(planes)))).reshape(mask.shape)


# Dark to bright in even steps of lightness, readable without colour vision.
HEAT = ((0.0, 0.0, 0.015), (0.34, 0.06, 0.43), (0.74, 0.22, 0.33), (0.98, 0.56, 0.04), (0.99, 1.0, 0.64))


def heat_colours(values: Tensor) -> Tensor:
    """Values (...) in 0..1 as colours (..., 3), on straight lines between the anchors of HEAT."""
    anchors = torch.tensor(HEAT, dtype=values.dtype, device=values.device)
    place = values.clamp(0, 1) * (len(HEAT) - 1)
    low = place.floor().clamp_max(len(HEAT) - 2)
    return torch.lerp(anchors[low.long()], anchors[low.long() + 1], (place - low)[..., None])
