"""What trainings see: pictures in buckets of like size, in an order that follows from the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..colours import rgb
from .seeds import generator_at

BUCKET_STEP = 64  # pixels: sides of buckets are multiples, as the models were trained
SMALLEST_SIDE = 64


class Seen(Protocol):
    """One example. bucket: those of one can share a batch; prior: it stands for its class, not for what is learned."""

    prior: bool

    @property
    def bucket(self) -> tuple[int, ...]:
        """Height and width in cells of a latent."""


class OrderSettings(Protocol):
    """What of a node's settings says in which order its examples come."""

    seed: int
    repeats: int
    batch_size: int
    accumulation: int


def bucket_of(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) in multiples of 64 pixels, of the picture's proportions and at most resolution^2 pixels."""
    scale = resolution / math.sqrt(width * height)
    sides = [max(SMALLEST_SIDE, BUCKET_STEP * round(side * scale / BUCKET_STEP)) for side in (width, height)]
    while sides[0] * sides[1] > max(resolution, SMALLEST_SIDE) ** 2 and max(sides) > SMALLEST_SIDE:
        sides[sides.index(max(sides))] -= BUCKET_STEP
    return sides[0], sides[1]


def covering(picture: Tensor, width: int, height: int, mode: str = "area") -> Tensor:
    """A picture (1, C, H, W) resized to cover (width, height), and its middle cut out."""
    scale = max(width / picture.shape[3], height / picture.shape[2])
    size = [max(height, round(picture.shape[2] * scale)), max(width, round(picture.shape[3] * scale))]
    mode = "bicubic" if scale > 1 and mode == "area" else mode
    resized = F.interpolate(picture, size=size, mode=mode, **({"antialias": True} if mode == "bicubic" else {}))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, :, top : top + height, left : left + width].clamp(0, 1)


def split_pictures(images: Sequence[Tensor]) -> list[Tensor]:
    """IMAGEs (B, H, W, C), each a picture or a batch, as pictures (1, H, W, 3)."""
    return [picture for batch in images for picture in rgb(batch, "images").split(1)]


@dataclass(frozen=True)
class Order:
    """Which pictures are seen when: everything follows from the seed, so that a training can be taken up anywhere.

    An epoch shows each picture `repeats` times, in batches of one bucket. Where there are pictures of the class, each
    step shows one of them as well.
    """

    examples: Sequence[Seen]
    settings: OrderSettings

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of the optimiser."""
        return len(self.epoch(0))

    def epoch(self, number: int) -> list[list[list[int]]]:
        """The steps of an epoch, each of the batches whose gradients it adds up, each of some pictures' numbers."""
        drawn = generator_at(self.settings.seed, "order", number)
        rows = [i for i, example in enumerate(self.examples) if not example.prior] * self.settings.repeats
        buckets: dict[tuple, list[int]] = {}
        for row in shuffled(rows, drawn):
            buckets.setdefault(self.examples[row].bucket, []).append(row)
        size, together = self.settings.batch_size, self.settings.accumulation
        batches = [found[i : i + size] for found in buckets.values() for i in range(0, len(found), size)]
        batches = shuffled(batches, drawn)
        steps = [batches[i : i + together] for i in range(0, len(batches), together)]
        priors = [i for i, example in enumerate(self.examples) if example.prior]
        return [[*step, shuffled(priors, drawn)[:1]] for step in steps] if priors else steps


def shuffled(values: list, drawn: torch.Generator) -> list:
    """The values in random order."""
    return [values[i] for i in torch.randperm(len(values), generator=drawn).tolist()]
