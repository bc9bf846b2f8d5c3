"""What is trained on: pictures in buckets of like size, with their captions and masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import training
from ..colours import rgb
from .settings import LoRASettings

BUCKET_STEP = 64  # pixels: sides of buckets are multiples, as the models were trained
SMALLEST_SIDE = 64


@dataclass(frozen=True, eq=False)
class Example:
    """One picture: its latent (1, C, H, W) in the model's scale and its weight in the loss, (1, 1, H, W) or None.

    mirrored: the latent of the picture seen in a mirror, where that is learned too. prior: it stands for its class, not
    for what is learned.
    """

    latent: Tensor
    caption: str
    where: Tensor | None = None
    mirrored: Tensor | None = None
    prior: bool = False

    @property
    def bucket(self) -> tuple[int, int]:
        """Pictures of one bucket can share a batch."""
        return tuple(self.latent.shape[2:])


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


def captions_for(count: int, captions: Sequence[str], trigger: str) -> list[str]:
    """A caption for each of `count` pictures, behind the trigger word.

    Takes a caption for each; one text of as many lines; or one line for all. Raises ValueError for any other number.
    """
    texts = list(captions)
    if len(texts) == 1 and count > 1:
        texts = [line for line in texts[0].splitlines() if line.strip()] or texts
    if len(texts) == 1:
        texts = texts * count
    if len(texts) != count:
        raise ValueError(
            f"there are {len(texts)} captions for {count} pictures: give one for each in their order, one text with a "
            "line for each, or one line for all."
        )
    plain = (" ".join(text.split()).strip() for text in texts)
    return [", ".join(filter(None, (trigger.strip(), text))) for text in plain]


def masks_for(count: int, masks: Sequence[Tensor]) -> list[Tensor | None]:
    """A mask (1, 1, H, W) for each of `count` pictures, or None for each. Raises ValueError for any other number."""
    if not masks:
        return [None] * count
    found = [mask[None] for batch in masks for mask in batch.reshape(-1, *batch.shape[-2:]).split(1)]
    found = found * count if len(found) == 1 else found
    if len(found) != count:
        raise ValueError(f"there are {len(found)} masks for {count} pictures: give one for each, or one for all.")
    empty = next((number for number, mask in enumerate(found, 1) if not (mask > 0).any()), None)
    if empty is not None:
        raise ValueError(f"mask {empty} is empty, so that nothing of its picture would be learned: paint the subject.")
    return found


def examples(
    model: Any,
    vae: Any,
    pictures: Sequence[Tensor],
    captions: Sequence[str],
    masks: Sequence[Tensor | None],
    *,
    settings: LoRASettings,
    prior: bool = False,
) -> Iterator[Example]:
    """Each picture, encoded at the size of its bucket; mirrored as well where the settings say so."""

    def encoded(pixels: Tensor) -> Tensor:
        return model.model.process_latent_in(vae.encode(pixels)).float().cpu().clone()

    for picture, caption, mask in zip(pictures, captions, masks, strict=True):
        width, height = bucket_of(picture.shape[2], picture.shape[1], settings.resolution)
        pixels = covering(picture.movedim(-1, 1).float(), width, height).movedim(1, -1)
        latent = encoded(pixels)
        where = None if mask is None else F.adaptive_avg_pool2d(covering(mask.float(), width, height), latent.shape[2:])
        mirrored = encoded(pixels.flip(2)) if settings.flip and not prior else None
        yield Example(latent, caption, where, mirrored, prior)


@dataclass(frozen=True)
class Order:
    """Which pictures are seen when: everything follows from the seed, so that a training can be taken up anywhere.

    An epoch shows each picture `repeats` times, in batches of one bucket. Where there are pictures of the class, each
    step shows one of them as well.
    """

    examples: Sequence[Example]
    settings: LoRASettings

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of the optimiser."""
        return len(self.epoch(0))

    def epoch(self, number: int) -> list[list[list[int]]]:
        """The steps of an epoch, each of the batches whose gradients it adds up, each of some pictures' numbers."""
        drawn = training.generator_at(self.settings.seed, "order", number)
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
