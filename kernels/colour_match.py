"""The colours of an edit brought back to its source's: maps fitted to pixels that should be equal.

Colours are (P, 3), of the same places in both pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .pausing import pause
from .robust import LEVEL, biweight, weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

ColourMap = tuple["Tensor", "Tensor"]
ColourFit = Callable[["Tensor", "Tensor", "Tensor"], ColourMap]


def recolour(colours: Tensor, fitted: ColourMap) -> Tensor:
    """c' = A c + b for colours (..., 3), with A (3, 3) and b (3)."""
    matrix, offset = (t.to(colours) for t in fitted)
    return colours @ matrix.T + offset


def recolour_within(colours: Tensor, fitted: ColourMap, seen: Tensor) -> Tensor:
    """recolour, but no channel changes by more than it does for any of the colours seen (P, 3).

    So a map is not carried on to colours far from those that it was made from.
    """
    change = recolour(seen, fitted) - seen
    low, high = change.amin(0).to(colours), change.amax(0).to(colours)
    found = recolour(colours, fitted)
    pause()
    changed = (found - colours).clamp(low, high)
    pause()
    return colours + changed


def fit_nothing(edited: Tensor, source: Tensor, weights: Tensor) -> ColourMap:
    """A = 1, b = 0."""
    return torch.eye(3).to(edited), torch.zeros(3).to(edited)


def fit_mean(edited: Tensor, source: Tensor, weights: Tensor) -> ColourMap:
    """The offset between the weighted means: A = 1, b = mean(s) - mean(e). Colours (P, 3), weights (P)."""
    return torch.eye(3).to(edited), weighted_mean(source, weights) - weighted_mean(edited, weights)


def fit_mean_and_spread(edited: Tensor, source: Tensor, weights: Tensor) -> ColourMap:
    """Mean and standard deviation of each channel, c' = (std_s / std_e) (c - mean_e) + mean_s.

    Reinhard and others 2001, "Color Transfer between Images", eq. 10 and 11, in the picture's own RGB instead of
    l-alpha-beta: an edit's tint and contrast act on these. Variances get one squared 8-bit step added, so that a flat
    channel keeps its contrast.
    """
    mean_s, mean_e = weighted_mean(source, weights), weighted_mean(edited, weights)
    spread_s = weighted_mean((source - mean_s).square(), weights)
    spread_e = weighted_mean((edited - mean_e).square(), weights)
    gain = ((spread_s + LEVEL**2) / (spread_e + LEVEL**2)).sqrt()
    return torch.diag(gain), mean_s - gain * mean_e


def fit_linear(edited: Tensor, source: Tensor, weights: Tensor) -> ColourMap:
    """The affine map of least weighted squares, min sum w |A e + b - s|^2 + P sigma^2 |A - 1|^2.

    sigma is one 8-bit step: along colours that do not occur outside, the map changes nothing.
    """
    mean_s, mean_e = weighted_mean(source, weights), weighted_mean(edited, weights)
    x, y = edited - mean_e, (source - mean_s) - (edited - mean_e)
    weighted = x * weights[:, None]
    ridge = LEVEL**2 * weights.sum() * torch.eye(3).to(x)
    matrix = torch.linalg.solve(weighted.T @ x + ridge, weighted.T @ y).T + torch.eye(3).to(x)
    return matrix, mean_s - matrix @ mean_e


def fit_robustly(fit: ColourFit, edited: Tensor, source: Tensor) -> ColourMap:
    """A colour fit that a minority of pixels which differ for another reason cannot draw aside.

    Iteratively reweighted least squares with Tukey's biweight (Beaton and Tukey 1974), 15 rounds. Colours (P, 3) of the
    same places; in float64.
    """
    e, s = edited.double(), source.double()
    weights = torch.ones_like(e[:, 0])
    for _ in range(15):
        fitted = fit(e, s, weights)
        weights = biweight((recolour(e, fitted) - s).norm(dim=1))
    return fitted


def held_out_error(fit: ColourFit, edited: Tensor, source: Tensor, halves: list[Tensor]) -> float:
    """Mean absolute error of a robust fit on pixels that it was not made from.

    halves: (P) bool each; every one of them and every complement is left out once.
    """
    errors = []
    for half in [*halves, *(~half for half in halves)]:
        fitted = fit_robustly(fit, edited[~half], source[~half])
        errors.append((recolour(edited[half].double(), fitted) - source[half]).abs().mean().item())
    return sum(errors) / len(errors)
