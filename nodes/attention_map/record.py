"""What was recorded of some words: the maps of one sampling run, and whose picture it gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import host

KEPT_RUNS = 8


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """Where W words acted in one sampling run of T steps and B pictures.

    samples (B, C, H, W) or (B, C, F, H, W): the latent that the run gave, by which a reader knows it. levels: by the
    grid (h, w) of the layers, the share of a place's attention that went to each word, (T, B, W, h, w) float32 on the
    CPU, averaged over heads, layers and the model calls of a step; nan in steps that were not recorded. Empty if no
    prompt held the words. Of videos B counts the frames of their latents, of which each but the first stands for
    `ratio` of the video's.
    """

    samples: Tensor
    levels: Mapping[host.Grid, Tensor]
    ratio: int = 1

    def of_video(self, maps: Tensor) -> Tensor:
        """Maps (B, ...) of pictures as they are, of the frames of latents for every frame of their videos."""
        frames = self.samples.shape[2] if self.samples.ndim == 5 else 1
        if frames == 1 or len(maps) != len(self.samples) * frames:
            return maps
        rest = maps.unflatten(0, (-1, frames))[:, 1:].repeat_interleave(self.ratio, 1)
        return torch.cat([maps.unflatten(0, (-1, frames))[:, :1], rest], 1).flatten(0, 1)

    @property
    def bytes(self) -> int:
        """Memory that the maps take."""
        return sum(level.numel() * level.element_size() for level in self.levels.values())


class AttentionRecord:
    """What recorders saw of some words: the latest runs of the sampler that they were given to.

    The node that makes it has run before the sampler does, so it is filled later; runs are told apart by the latent
    they gave, so that a cached sampler, a second sampler or another seed never shows another picture's maps.
    """

    def __init__(self, words: tuple[str, ...], needs_samples: bool = True):
        self.words, self.needs_samples = words, needs_samples
        self.runs: list[RecordedRun] = []

    def add(self, run: RecordedRun) -> None:
        """Keep a finished run; the oldest of too many goes."""
        self.runs = [*self.runs[1 - KEPT_RUNS :], run]

    def of(self, samples: Tensor | None) -> RecordedRun:
        """The run that gave this LATENT. Raises ValueError if there is none, or if it never saw the words."""
        if samples is None and self.needs_samples:
            raise ValueError(
                "samples is not connected: connect the LATENT of the sampler that uses Attention Map's model, so that "
                "the map is read after sampling and belongs to that picture."
            )
        found = self.runs if samples is None else [run for run in self.runs if same_latent(run.samples, samples)]
        if not found:
            state = "holds no run of a sampler yet" if not self.runs else "holds no run that gave these samples"
            raise ValueError(
                f"the attention record {state}: give the model of Attention Map to the sampler and connect that "
                "sampler's own LATENT to samples (not a resized or composited one). If both are so, the host has "
                "forgotten the run: change the seed to sample again."
            )
        if not found[-1].levels:
            raise ValueError(
                f"the words {', '.join(map(repr, self.words))} were in no prompt that was sampled, or in none at the "
                "recorded steps: theirs was averaged, or encoded by another CLIP or LoRA. Sample with the positive "
                "output of Select Words; combining, concatenating and areas are fine."
            )
        return found[-1]


def same_latent(kept: Tensor, given: Tensor) -> bool:
    """Whether a LATENT is what a run gave, in whatever precision the host hands it on."""
    return kept.shape == given.shape and torch.equal(kept.to(given.dtype), given.cpu())


def span(steps: int, start: float, end: float) -> range:
    """The steps that a share of them covers, at least one."""
    first = min(math.floor(start * steps), steps - 1)
    return range(first, max(math.ceil(end * steps), first + 1))
