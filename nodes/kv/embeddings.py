"""Key/value embeddings tuned to a picture: what travels between the nodes, and lies in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...kernels import low_rank
from ...kernels.kv_inversion import between_keyframes
from .. import host
from .settings import GUIDED

SCALARS = ("lambda_k", "gamma_k", "lambda_v", "gamma_v")
LEARNED, SOURCE, WEIGHTS = "learned", "source", "weights"
HOLDS = "holds"  # in the info: which of the three there are; weights alone act on the source's K, V
MATRICES = {LEARNED: 2, SOURCE: 1}  # matrices a layer: K_hat and V_hat; the tokens that K and V are made of


@dataclass(frozen=True)
class TunedLayer:
    """Where one set of embeddings belongs: a self-attention layer and its token grid."""

    block: str
    number: int
    index: int
    height: int
    width: int
    channels: int

    @property
    def key(self) -> tuple[str, int, int]:
        """The layer's name in the host's patch options."""
        return self.block, self.number, self.index

    @property
    def tokens(self) -> int:
        """Number of tokens N."""
        return self.height * self.width

    def factored(self, rank: int) -> bool:
        """Whether a (N, C) matrix of this layer is kept as two factors of this rank; 0 is full."""
        return low_rank.worthwhile(self.tokens, self.channels, rank)

    def elements(self, rank: int) -> int:
        """Numbers kept for one (N, C) matrix of one picture."""
        return rank * (self.tokens + self.channels) if self.factored(rank) else self.tokens * self.channels


@dataclass(frozen=True)
class LayerEmbeddings:
    """One layer at one step: K_hat, V_hat (B, N, C), their four weights (B, 1, 1), and the source as the layer met it.

    source (B, N, C) is what the untouched network feeds the layer's to_k and to_v for the source at this step, on the
    path that rebuilds it; k_source, v_source are what they make of it (`projected`). None where not asked for or kept;
    gamma None is 1, which is stored multiplied into K_hat, V_hat.
    """

    k_hat: Tensor | None
    v_hat: Tensor | None
    lambda_k: Tensor
    gamma_k: Tensor | None
    lambda_v: Tensor
    gamma_v: Tensor | None
    source: Tensor | None = None
    k_source: Tensor | None = None
    v_source: Tensor | None = None

    def projected(self, to_k: Callable[[Tensor], Tensor], to_v: Callable[[Tensor], Tensor]) -> LayerEmbeddings:
        """With the source's own keys and values; they stand for K_hat, V_hat too where only weights were learned."""
        if self.source is None:
            return self
        k_source, v_source = to_k(self.source), to_v(self.source)
        k_hat, v_hat = (k_source, v_source) if self.k_hat is None else (self.k_hat, self.v_hat)
        return replace(self, k_hat=k_hat, v_hat=v_hat, k_source=k_source, v_source=v_source)


@dataclass(frozen=True)
class KVEmbeddings:
    """Keys and values learned for a picture, for every tuned step and layer (psi_t of arXiv:2309.16608).

    sigmas: T+1 noise levels of the tuning, descending to 0. span: the steps first <= t < last in which CP-attention
    acts. learned[t] (B, P) holds K_hat, V_hat of step t for all layers in one piece, source[t] what the source feeds
    to_k and to_v (half the size of its K, V); None where nothing is kept: outside the span, and between keyframes,
    where the two neighbours are interpolated. Matrices are float16, full or (where that is smaller) factors of `rank`
    (learned) and `source_rank` (source). With no learned part at all, K_hat, V_hat are the source's K, V and only the
    weights were learned. scalars (T, L, 4, B) float32 in the order of SCALARS; `folded`: gamma is 1, being multiplied
    into K_hat, V_hat. noise (B, C, H, W) float32 is the inverted noise to sample from, as on a LATENT socket.
    """

    sigmas: tuple[float, ...]
    layers: tuple[TunedLayer, ...]
    span: tuple[int, int]
    learned: tuple[Tensor | None, ...]
    source: tuple[Tensor | None, ...]
    scalars: Tensor
    noise: Tensor
    layout: str
    rank: int = 0
    source_rank: int = 0
    folded: bool = False
    info: dict = field(default_factory=dict)

    @property
    def pictures(self) -> int:
        """Number of pictures B the embeddings were tuned to."""
        return self.scalars.shape[-1]

    @property
    def latent(self) -> tuple[int, int, int]:
        """(channels, height, width) of the source's latent."""
        return tuple(self.noise.shape[1:])

    @property
    def guidance(self) -> float | None:
        """The guidance at which edits should be sampled: the tuning's, where it was tuned with one; else None."""
        guidance = self.info.get("guidance")
        guided = self.info.get("tune_with", GUIDED) == GUIDED and not self.recorded_only
        return float(guidance) if guided and isinstance(guidance, int | float) else None

    @property
    def bytes(self) -> int:
        """Size of the embeddings in memory and on disk, without the header."""
        return sum(t.numel() * t.element_size() for t in (*self.learned, *self.source) if t is not None)

    @property
    def keeps_source(self) -> bool:
        """Whether the source's own keys and values are there."""
        return any(t is not None for t in self.source)

    @property
    def recorded_only(self) -> bool:
        """Whether nothing was learned, and there are the source's own keys and values alone."""
        return self.keeps_source and self.info.get(HOLDS) == [SOURCE]

    @property
    def weights_only(self) -> bool:
        """Whether only lambda and gamma were learned, K_hat and V_hat being the source's K and V."""
        return self.keeps_source and not self.recorded_only and all(t is None for t in self.learned)

    def at(self, sigma: float) -> int:
        """The step whose noise level is nearest to sigma: the rule when another schedule samples than tuned."""
        return host.nearest_level(self.sigmas[:-1], sigma)

    def ahead(self, index: int, share: float) -> int:
        """The step that lies `share` of the schedule nearer to the finished picture than step `index`."""
        return min(index + round(share * len(self.learned)), len(self.learned) - 1)

    def keyframes(self, index: int) -> tuple[int, int, float] | None:
        """(step kept at or before, step kept at or after, share of the latter) for a step; None outside the span."""
        first, last = self.span
        kept = [t for t in range(first, last) if self.learned[t] is not None or self.source[t] is not None]
        if not kept or not first <= index < last:
            return None
        before = max((t for t in kept if t <= index), default=kept[0])
        after = min((t for t in kept if t >= index), default=kept[-1])
        return before, after, (index - before) / max(after - before, 1)

    def pieces(self, index: int, parts: Iterable[str]) -> dict[tuple[str, int], Tensor]:
        """The tensors on the CPU that `step` needs, by (part, step)."""
        frames = self.keyframes(index)
        if frames is None:
            return {}
        parts = {SOURCE} | set(parts) - {LEARNED} if self.weights_only else set(parts)
        found = {(part, t): getattr(self, part)[t] for part in sorted(parts) for t in sorted(set(frames[:2]))}
        return {name: piece for name, piece in found.items() if piece is not None}

    def step(
        self, index: int, pieces: Mapping[tuple[str, int], Tensor], device: torch.device, dtype: torch.dtype
    ) -> dict[tuple, LayerEmbeddings] | None:
        """One step's embeddings by layer key, from the pieces of `pieces` moved to the device. None outside the span.

        Between keyframes embeddings and weights lie on the straight line between their neighbours.
        """
        frames = self.keyframes(index)
        if frames is None:
            return None
        before, after, share = frames
        pieces = {name: piece.to(dtype) for name, piece in pieces.items() if name[1] in (before, after)}
        learned = self.matrices(LEARNED, self.rank, frames, pieces)
        sources = self.matrices(SOURCE, self.source_rank, frames, pieces)
        scalars = between_keyframes(self.scalars[before], self.scalars[after], share)
        scalars = scalars.to(device=device, dtype=dtype, non_blocking=True)[..., None, None].unbind(0)
        return {
            layer.key: self.of_layer(hats, source, weights)
            for layer, hats, source, weights in zip(self.layers, learned, sources, scalars, strict=True)
        }

    def matrices(
        self, part: str, rank: int, frames: tuple[int, int, float], pieces: Mapping[tuple[str, int], Tensor]
    ) -> list[tuple[Tensor | None, ...]]:
        """One part's matrices of every layer at a step that lies between two kept ones; None where it is not kept."""
        before, after, share = frames
        if (part, before) not in pieces:
            return [(None,) * MATRICES[part]] * len(self.layers)
        start = self.unpack(pieces[part, before], part, rank)
        if before == after:
            return start
        end = self.unpack(pieces[part, after], part, rank)
        return [
            tuple(between_keyframes(a, b, share) for a, b in zip(*layers, strict=True))
            for layers in zip(start, end, strict=True)
        ]

    def of_layer(
        self, hats: tuple[Tensor | None, ...], source: tuple[Tensor | None], weights: Tensor
    ) -> LayerEmbeddings:
        """One layer at one step. hats: K_hat, V_hat; weights (4, B, 1, 1)."""
        lambda_k, gamma_k, lambda_v, gamma_v = weights
        return LayerEmbeddings(
            k_hat=hats[0],
            v_hat=hats[1],
            lambda_k=lambda_k,
            gamma_k=None if self.folded else gamma_k,
            lambda_v=lambda_v,
            gamma_v=None if self.folded else gamma_v,
            source=source[0],
        )

    def unpack(self, piece: Tensor, part: str, rank: int) -> list[tuple[Tensor, ...]]:
        """The matrices, (B, N, C) each, of every layer from one piece (B, P): K_hat and V_hat, or the source."""
        found, start = [], 0
        for layer in self.layers:
            matrices = []
            for _ in range(MATRICES[part]):
                numbers = piece[:, start : start + layer.elements(rank)]
                start += layer.elements(rank)
                if layer.factored(rank):
                    left, right = numbers.split([rank * layer.tokens, rank * layer.channels], 1)
                    matrices.append(left.unflatten(1, (-1, rank)) @ right.unflatten(1, (-1, rank)).mT)
                else:
                    matrices.append(numbers.unflatten(1, (layer.tokens, layer.channels)))
            found.append(tuple(matrices))
        return found


def pack(layers: Iterable[Iterable[tuple[Tensor, ...]]]) -> Tensor:
    """One (B, P) float16 piece on the CPU, in the order KVEmbeddings.unpack reads.

    layers: per layer its matrices, each (B, N, C) alone, or its two factors (B, N, r) and (B, C, r).
    """
    flat = [factor.detach().flatten(1) for matrices in layers for factors in matrices for factor in factors]
    return torch.cat(flat, 1).to("cpu", torch.float16)
