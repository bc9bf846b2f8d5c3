"""Matrices kept as a product of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor


def worthwhile(height: int, width: int, rank: int) -> bool:
    """Whether two factors of this rank hold fewer numbers than the matrix (height, width) itself; rank 0 means full."""
    return 0 < rank * (height + width) < height * width


def factorise(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by rank r, as factors: M ~ U W^T.

    The truncated singular value decomposition, found by a randomised range finder with two power iterations (Halko,
    Martinsson and Tropp 2011, algorithm 5.1) from a fixed seed, so that equal input gives equal factors.

    matrix (..., N, C) -> U (..., N, r), W (..., C, r) in float32. Raises ValueError for a rank above min(N, C).
    """
    if not 0 < rank <= min(matrix.shape[-2:]):
        raise ValueError(f"factorise: rank must be 1 to {min(matrix.shape[-2:])} here, got {rank}")
    oversampled = min(rank + 8, *matrix.shape[-2:])
    with torch.random.fork_rng([matrix.device] if matrix.device.type == "cuda" else []):
        torch.manual_seed(0)
        u, s, w = torch.svd_lowrank(matrix.float(), q=oversampled, niter=2)
    return u[..., :rank] * s[..., None, :rank], w[..., :rank]
