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
from .settings import EVERYTHING, TuneSettings
from .tuning import tune

STEPS, ITERATIONS = 5, 3
CANDIDATE_LAYERS, STARTS = ("decoder", "all"), (0.0, 0.2, 0.4)
SLACK = 1.1


@dataclass(frozen=True)
class Candidate:
    """Layers and a start that were tried: how well they rebuild, how far the layout strays, what is stored."""

    layers: str
    start_percent: float
    error: float
    strayed: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.layers} from {self.start_percent:g}: error {self.error:.3f}, layout {self.strayed:.4f}"


def choose(
    model: Any,
    trajectory: host.Trajectory,
    positive: list,
    negative: list | None,
    settings: TuneSettings,
    *,
    report: Callable[[int, int], None],
    mask: Tensor | None = None,
) -> tuple[Candidate, list[Candidate]]:
    """Try layers and starts on a few coarse steps; the one that meddles least among those that rebuild well.

    error: latent RMSE against the source, relative to its spread; strayed: self-similarity distance to the source of
    what a layer's keys are made of in the last step.
    """
    coarse, quick = coarsened(trajectory), quickened(settings)
    clean = trajectory.latents[-1]

    def attempt(part: host.Trajectory, **changes: Any) -> tuple[KVEmbeddings, Tensor]:
        return tune(model, part, positive, negative, replace(quick, **changes), mask=mask)

    ending = replace(coarse, sigmas=coarse.sigmas[-2:], latents=coarse.latents[-2:])
    wanted = last_keys(attempt(ending, layers="decoder", start_percent=0.0, inner_steps=0)[0])
    tried = []
    candidates = list(itertools.product(CANDIDATE_LAYERS, STARTS))
    for number, (layers, start) in enumerate(candidates):
        report(number + 1, len(candidates))
        kv, rebuilt = attempt(coarse, layers=layers, start_percent=start)
        error = (model.model.process_latent_in(rebuilt) - clean).pow(2).mean().sqrt() / clean.std()
        strayed = self_similarity_distance(last_keys(kv), wanted).mean()
        tried.append(Candidate(layers, start, float(error), float(strayed), kv.bytes))
    return least_meddling(tried), tried


def coarsened(trajectory: host.Trajectory) -> host.Trajectory:
    """A trajectory of a few of its steps."""
    count = min(STEPS, trajectory.steps)
    chosen = [round(i * trajectory.steps / count) for i in range(count + 1)]
    return replace(trajectory, sigmas=tuple(trajectory.sigmas[i] for i in chosen), latents=trajectory.latents[chosen])


def quickened(settings: TuneSettings) -> TuneSettings:
    """Settings of a try: few iterations, every step by itself, with the source that is to be compared."""
    return replace(
        settings,
        inner_steps=min(settings.inner_steps, ITERATIONS),
        keep_source=True,
        end_percent=1.0,
        keyframes=1,
        batch_steps=1,
        learn=EVERYTHING,
    )


def last_keys(kv: KVEmbeddings) -> Tensor:
    """What the keys of the largest decoder layer are made of in the last step."""
    step = len(kv.source) - 1
    found = kv.step(step, kv.pieces(step, [SOURCE]), torch.device("cpu"), torch.float32)
    largest = max((layer for layer in kv.layers if layer.block == "output"), key=lambda la: min(la.tokens, 1024))
    return found[largest.key].source


def least_meddling(tried: list[Candidate]) -> Candidate:
    """Within a tenth of the best in both numbers, the latest start (it leaves the new pose free), then the smallest."""
    good = [
        c
        for c in tried
        if c.error <= SLACK * min(t.error for t in tried) and c.strayed <= SLACK * min(t.strayed for t in tried)
    ] or [min(tried, key=lambda c: c.error)]
    return min(good, key=lambda c: (-c.start_percent, c.bytes))
