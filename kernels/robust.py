"""Estimates that a minority of foreign pixels cannot draw aside. Values are those of pictures in 0..1."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 1 / 255  # one step of an 8-bit picture
FEWEST = 256  # pixels below which nothing is estimated
TUKEY = 4.685  # cut-off of the biweight in standard deviations, 95 % efficient for Gaussian errors
MAD_TO_STD = 1.4826


def biweight(residuals: Tensor, typical: Tensor | None = None) -> Tensor:
    """(1 - (r / (c s))^2)^2 within c s, else 0, with s = 1.4826 median(r) and at least an eighth of an 8-bit step.

    residuals (P), not negative; typical (P) bool: the ones the median is taken of.
    """
    median = (residuals if typical is None else residuals[typical]).median()
    scale = (MAD_TO_STD * median).clamp_min(LEVEL / 8)
    return (1 - (residuals / (TUKEY * scale)).square()).clamp_min(0).square()


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum w v / sum w over the first dimension, values (P, 3), weights (P) -> (3)."""
    return (values * weights[:, None]).sum(0) / weights.sum()


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation coefficient of two lists of values; 0 where one is constant."""
    a, b = (t.double() - t.double().mean() for t in (first, second))
    spread = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a * b).sum().item() / spread if spread > 1e-12 else 0.0


def sampled(region: Tensor, most: int) -> Tensor:
    """Flat indices of the pixels of a region, every n-th if they are more than `most`."""
    places = region.flatten().nonzero()[:, 0]
    return places[:: max(1, -(-len(places) // most))]
