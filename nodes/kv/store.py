"""What a tuning keeps of its finished steps, on the CPU, until it becomes KV embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import low_rank
from .. import host
from .embeddings import LEARNED, SOURCE, WEIGHTS, KVEmbeddings, TunedLayer, pack
from .psi import Psi
from .settings import TuneSettings
from .tuned_attention import TuningState


class FinishedSteps:
    """Learned parameters, the source's tokens and the weights of every finished step.

    layers: those that ran, with their grids; known after the first pass. channels: of the layers that were asked for.
    """

    def __init__(self, steps: int, channels: dict[host.LayerKey, int], settings: TuneSettings):
        self.steps, self.channels, self.settings = steps, channels, settings
        self.layers: list[TunedLayer] = []
        self.learned: list[Tensor | None] = [None] * steps
        self.source: list[Tensor | None] = [None] * steps
        self.scalars: dict[int, Tensor] = {}

    def note_layers(self, state: TuningState) -> None:
        """Learn the token grids from the pass that just ran."""
        if not state.grids:
            raise RuntimeError("none of the chosen layers ran: the model's blocks are replaced by another node.")
        self.layers = self.layers or [
            TunedLayer(*key, *state.grids[key], channels)
            for key, channels in self.channels.items()
            if key in state.grids
        ]

    def keep(self, step: int, psi: Psi, state: TuningState) -> None:
        """Store a finished step."""
        weights = torch.stack([psi.weights(layer.key).detach()[..., 0, 0] for layer in self.layers])
        if not psi.fixed:
            gammas = weights[:, :, 1::2, None, None].clone()
            if self.settings.folded:
                weights[:, :, 1::2] = 1.0
            else:
                gammas[:] = 1.0
            self.learned[step] = pack(
                [acting(state, layer, factors, gamma[:, i]) for i, factors in enumerate(psi.factors[layer.key])]
                for layer, gamma in zip(self.layers, gammas, strict=True)
            )
        if self.settings.needs_source:
            self.keep_source(step, state)
        self.scalars[step] = weights.transpose(1, 2).cpu()

    def keep_source(self, step: int, state: TuningState) -> None:
        """Store what the source feeds to_k and to_v at a step."""
        rank, inputs = self.settings.source_rank, {layer: state.inputs[layer.key] for layer in self.layers}
        self.source[step] = pack(
            [low_rank.factorise(tokens, rank) if layer.factored(rank) else (tokens,)]
            for layer, tokens in inputs.items()
        )

    @property
    def holds(self) -> list[str]:
        """What there is of learned keys and values, weights of the source's, and the source."""
        learned = LEARNED if any(t is not None for t in self.learned) else WEIGHTS
        return [learned, SOURCE] if any(t is not None for t in self.source) else [learned]

    def embeddings(self, trajectory: host.Trajectory, noise: Tensor, info: dict[str, Any]) -> KVEmbeddings:
        """All steps. noise: the latent that the tuning began with."""
        untouched = torch.ones(len(self.layers), 4, trajectory.pictures)
        return KVEmbeddings(
            sigmas=trajectory.sigmas,
            layers=tuple(self.layers),
            span=self.settings.span(self.steps),
            learned=tuple(self.learned),
            source=tuple(self.source),
            scalars=torch.stack([self.scalars.get(i, untouched) for i in range(self.steps)]),
            noise=noise,
            layout=trajectory.layout,
            rank=self.settings.rank,
            source_rank=self.settings.source_rank,
            folded=self.settings.folded,
            info=info,
        )


def acting(state: TuningState, layer: TunedLayer, factors: tuple[Tensor, ...], gamma: Tensor) -> tuple[Tensor, ...]:
    """K_hat or V_hat as it acts: with gamma, and with the mask's weights on its tokens."""
    first = factors[0].detach() * gamma
    mask = state.tokens(layer.height, layer.width, len(first))
    return (first if mask is None else first * mask.to(first)), *factors[1:]
