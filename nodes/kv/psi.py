"""psi_t of KV Inversion: the parameters that are learned at a step, alone or several steps at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.kv_inversion import between_keyframes
from .embeddings import TunedLayer


class Psi:
    """The learnable parameters of some rows (pictures, or steps x pictures): embeddings and four weights a layer.

    lambda = gamma = 1 and K_hat = V_hat = 0 to begin with: eq. 1 changes nothing, and the gradient reaches K_hat at
    once. At rank r, K_hat = U W^T with U = 0. With `source`, K_hat and V_hat are the source's K and V, gamma begins at
    0, and only the weights learn. All tensors hold the rows in dimension 0.
    """

    def __init__(
        self,
        layers: list[TunedLayer],
        rows: int,
        device: torch.device,
        rank: int = 0,
        source: dict[tuple, tuple[Tensor, Tensor]] | None = None,
    ):
        self.fixed = source is not None
        self.factors: dict[tuple, tuple[tuple[Tensor, ...], ...]] = {}
        self.scalars = {layer.key: torch.ones(rows, 4, 1, 1, device=device) for layer in layers}
        generator = torch.Generator().manual_seed(0)

        def zero(layer: TunedLayer) -> tuple[Tensor, ...]:
            if not layer.factored(rank):
                return (torch.zeros(rows, layer.tokens, layer.channels, device=device),)
            right = torch.randn(1, layer.channels, rank, generator=generator) / rank**0.5
            return torch.zeros(rows, layer.tokens, rank, device=device), right.to(device).repeat(rows, 1, 1)

        for layer in layers:
            if source is not None:
                self.factors[layer.key] = tuple((t,) for t in source[layer.key])
                self.scalars[layer.key][:, 1::2] = 0.0
            else:
                self.factors[layer.key] = zero(layer), zero(layer)

    def embeddings(self, key: tuple) -> tuple[Tensor, Tensor]:
        """K_hat, V_hat of a layer, (rows, N, C)."""
        return tuple(f[0] if len(f) == 1 else f[0] @ f[1].mT for f in self.factors[key])

    def weights(self, key: tuple) -> Tensor:
        """lambda_k, gamma_k, lambda_v, gamma_v of a layer, (rows, 4, 1, 1)."""
        return self.scalars[key]

    def learnable(self) -> tuple[list[Tensor], list[Tensor]]:
        """(embedding tensors, weights) that the optimiser moves."""
        pairs = () if self.fixed else self.factors.values()
        return [t for pair in pairs for factors in pair for t in factors], list(self.scalars.values())

    def tensors(self) -> list[Tensor]:
        """All learnable tensors."""
        return list(itertools.chain(*self.learnable()))

    def per_row(self, losses: Tensor) -> Tensor:
        """Losses of the rows that a row of these parameters answers for."""
        return losses

    def map(self, change: Callable[[Tensor], Tensor]) -> Psi:
        """A copy with every tensor changed."""
        other = Psi.__new__(Psi)
        other.fixed = self.fixed
        other.factors = {
            key: tuple(tuple(change(t.detach()) for t in factors) for factors in pair)
            for key, pair in self.factors.items()
        }
        other.scalars = {key: change(t.detach()) for key, t in self.scalars.items()}
        return other

    def repeated(self, times: int) -> Psi:
        """A copy with the rows repeated."""
        return self.map(lambda t: t.repeat(times, *(1,) * (t.ndim - 1)))


class BetweenKeyframes:
    """Parameters of several steps at once, on the straight line from a finished keyframe to the one being learned.

    Rows are steps x pictures; step j of m lies the share (j + 1) / m of the way.
    """

    def __init__(self, before: Psi, after: Psi, steps: int):
        self.before, self.after, self.steps = before, after, steps

    def mixed(self, start: Tensor, end: Tensor) -> Tensor:
        share = (torch.arange(self.steps, device=start.device) + 1.0) / self.steps
        share = share.view(-1, *(1,) * start.ndim)
        return between_keyframes(start.detach()[None], end[None], share).flatten(0, 1)

    def embeddings(self, key: tuple) -> tuple[Tensor, Tensor]:
        """As Psi.embeddings, for steps x pictures rows."""
        pairs = zip(self.before.embeddings(key), self.after.embeddings(key), strict=True)
        return tuple(self.mixed(start, end) for start, end in pairs)

    def weights(self, key: tuple) -> Tensor:
        """As Psi.weights, for steps x pictures rows."""
        return self.mixed(self.before.weights(key), self.after.weights(key))

    def learnable(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the keyframe being learned."""
        return self.after.learnable()

    def tensors(self) -> list[Tensor]:
        """All learnable tensors."""
        return self.after.tensors()

    def per_row(self, losses: Tensor) -> Tensor:
        """Each picture's mean loss over the steps."""
        return losses.unflatten(0, (self.steps, -1)).mean(0)


class OneOfSeveral:
    """The parameters of one step out of BetweenKeyframes, for walking on with them."""

    def __init__(self, several: BetweenKeyframes, step: int):
        self.several, self.step = several, step

    def one(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.several.steps, -1))[self.step]

    def embeddings(self, key: tuple) -> tuple[Tensor, Tensor]:
        """K_hat, V_hat of this step, (pictures, N, C)."""
        return tuple(self.one(t) for t in self.several.embeddings(key))

    def weights(self, key: tuple) -> Tensor:
        """The four weights of this step, (pictures, 4, 1, 1)."""
        return self.one(self.several.weights(key))
