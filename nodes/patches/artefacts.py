"""What travels between the nodes: a recorded trajectory, and key/value embeddings tuned to a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

SCALARS = ("lambda_k", "gamma_k", "lambda_v", "gamma_v")


def nearest_level(sigmas: tuple[float, ...], sigma: float) -> int:
    """Index of the noise level nearest to sigma, by the ratio of the two (levels span four orders of magnitude)."""
    return min(range(len(sigmas)), key=lambda i: abs(math.log(max(sigmas[i], 1e-6) / max(sigma, 1e-6))))


@dataclass(frozen=True)
class Trajectory:
    """The latents a picture passes through on its way to noise: the supervision of KV Inversion, stage 1.

    sigmas: T+1 noise levels, descending, the last one 0. latents (T+1, B, C, H, W) float32 on the CPU, at those
    levels, in the host's x = x_0 + sigma eps and the model's latent scale. The fingerprints name the prompt and the
    architecture.
    """

    sigmas: tuple[float, ...]
    latents: Tensor
    guidance: float
    prompt: str
    layout: str

    @property
    def pictures(self) -> int:
        """Number of pictures B."""
        return self.latents.shape[1]

    @property
    def steps(self) -> int:
        """Number of steps T between the T+1 levels."""
        return len(self.sigmas) - 1


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
    def size(self) -> int:
        """Elements of one embedding of one picture."""
        return self.height * self.width * self.channels


@dataclass(frozen=True)
class LayerEmbeddings:
    """One layer at one step: K_hat, V_hat (B, N, C), their four weights (B, 1, 1), and the source's own K, V.

    k_source and v_source (B, N, C) are what the untouched network computes for the source at this step, on the path
    that rebuilds it; None when not kept.
    """

    k_hat: Tensor
    v_hat: Tensor
    lambda_k: Tensor
    gamma_k: Tensor
    lambda_v: Tensor
    gamma_v: Tensor
    k_source: Tensor | None = None
    v_source: Tensor | None = None


@dataclass(frozen=True)
class KVEmbeddings:
    """Keys and values learned for a picture, for every tuned step and layer (psi_t of arXiv:2309.16608).

    sigmas: T+1 noise levels of the tuning, descending to 0. steps[t] (B, P) holds step t's tensors of all layers in one
    piece, layer after layer, each as K_hat, V_hat and, with `keeps_source`, the source's K, V; None where CP-attention
    was off. scalars (T, L, 4, B) float32 in the order of SCALARS. latent is the source's (channels, height, width).
    """

    sigmas: tuple[float, ...]
    layers: tuple[TunedLayer, ...]
    steps: tuple[Tensor | None, ...]
    scalars: Tensor
    latent: tuple[int, int, int]
    keeps_source: bool
    layout: str
    info: dict = field(default_factory=dict)

    @property
    def pictures(self) -> int:
        """Number of pictures B the embeddings were tuned to."""
        return self.scalars.shape[-1]

    @property
    def bytes(self) -> int:
        """Size of the embeddings in memory and on disk, without the header."""
        return sum(step.numel() * step.element_size() for step in self.steps if step is not None)

    def at(self, sigma: float) -> int:
        """The step whose noise level is nearest to sigma: the rule when another schedule samples than tuned."""
        return nearest_level(self.sigmas[:-1], sigma)

    def ahead(self, index: int, share: float) -> int:
        """The step that lies `share` of the schedule nearer to the finished picture than step `index`."""
        return min(index + round(share * len(self.steps)), len(self.steps) - 1)

    def step(self, index: int, device: torch.device, dtype: torch.dtype) -> dict[tuple, LayerEmbeddings] | None:
        """One step's embeddings on a device, by layer key, moved in one copy. None if the step was not tuned."""
        blob = self.steps[index]
        if blob is None:
            return None
        blob = blob.to(device=device, dtype=dtype, non_blocking=True)
        scalars = self.scalars[index].to(device=device, dtype=dtype)[..., None, None]
        pieces = 4 if self.keeps_source else 2
        found, start = {}, 0
        for number, layer in enumerate(self.layers):
            part = blob[:, start : start + pieces * layer.size].unflatten(1, (pieces, -1, layer.channels)).unbind(1)
            start += pieces * layer.size
            found[layer.key] = LayerEmbeddings(part[0], part[1], *scalars[number], *part[2:])
        return found
