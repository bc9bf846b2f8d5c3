"""KV Inversion: which layers to learn in and from which step on, by trying a few coarsely."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.kv_inversion import self_similarity_distance
from .. import host
from .embeddings import SOURCE, KVEmbeddings
from .tuning import TuneSettings, tune

STEPS, ITERATIONS = 5, 3
PLACEMENTS, STARTS = ("decoder", "all"), (0.0, 0.2, 0.4)
SLACK = 1.1


@dataclass(frozen=True)
class Candidate:
    """One placement and start that was tried: how well it rebuilds, how far the layout strays, what it stores."""

    placement: str
    start: float
    error: float
    strayed: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.placement} from {self.start:g}: error {self.error:.3f}, layout {self.strayed:.4f}"


def choose(
    model: Any,
    trajectory: host.Trajectory,
    positive: list,
    negative: list | None,
    guidance: float,
    settings: TuneSettings,
    report: Callable[[int, int], None],
    mask: Tensor | None = None,
) -> tuple[Candidate, list[Candidate]]:
    """Try placements and starts on a few coarse steps; the one that meddles least among those that rebuild well.

    error: latent RMSE against the source, relative to its spread; strayed: self-similarity distance to the source of
    what a layer's keys are made of in the last step. Within a tenth of the best in both, later starts win (they leave
    the new pose free), then smaller embeddings.
    """
    count = min(STEPS, trajectory.steps)
    chosen = [round(i * trajectory.steps / count) for i in range(count + 1)]
    coarse = replace(trajectory, sigmas=tuple(trajectory.sigmas[i] for i in chosen), latents=trajectory.latents[chosen])
    quick = replace(
        settings, inner_steps=min(settings.inner_steps, ITERATIONS), keep_source=True, end=1.0, keyframes=1,
        batch_steps=1, weights_only=False,
    )  # fmt: skip
    clean = trajectory.latents[-1]

    def attempt(part: host.Trajectory, placement: str, using: TuneSettings) -> tuple[KVEmbeddings, Tensor]:
        return tune(model, part, positive, negative, guidance, placement, using, lambda *_: None, mask=mask)

    def last_keys(kv: KVEmbeddings) -> Tensor:
        step = len(kv.source) - 1
        found = kv.step(step, kv.pieces(step, [SOURCE]), torch.device("cpu"), torch.float32)
        largest = max((layer for layer in kv.layers if layer.block == "output"), key=lambda la: min(la.tokens, 1024))
        return found[largest.key].source

    ending = replace(coarse, sigmas=coarse.sigmas[-2:], latents=coarse.latents[-2:])
    wanted = last_keys(attempt(ending, "decoder", replace(quick, start=0.0, inner_steps=0))[0])
    tried = []
    candidates = list(itertools.product(PLACEMENTS, STARTS))
    for number, (placement, start) in enumerate(candidates):
        report(number + 1, len(candidates))
        kv, rebuilt = attempt(coarse, placement, replace(quick, start=start))
        error = (model.model.process_latent_in(rebuilt) - clean).pow(2).mean().sqrt() / clean.std()
        strayed = self_similarity_distance(last_keys(kv), wanted).mean()
        tried.append(Candidate(placement, start, float(error), float(strayed), kv.bytes))
    good = [
        c
        for c in tried
        if c.error <= SLACK * min(t.error for t in tried) and c.strayed <= SLACK * min(t.strayed for t in tried)
    ] or [min(tried, key=lambda c: c.error)]
    return min(good, key=lambda c: (-c.start, c.bytes)), tried
