"""What a training of a multimodal encoder is shown, step by step: pictures of one size, their prompts, their noise.

Every draw depends on the seed, the step and the row alone: a training that was interrupted goes on as if it had not
been, and processes that share a batch learn what one process learns from all of it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....kernels.denoising_loss import spread_levels
from ..dataset.dataset import STAGES, Dataset
from ..interleaved import Prompt
from ..vlm.vision_language import Hidden, VisionLanguage

ZEROS, LEARNED, CLIP_TEXT = "zeros", "learned", "CLIP text"


@dataclass(frozen=True)
class TrainSettings:
    """How an encoder is trained; see PalimpsestTrainMultimodal for what each does. tokens 0: as the stage says."""

    stage: str = next(iter(STAGES))
    steps: int = 1000
    batch: int = 4
    accumulate: int = 1
    tokens: int = 0
    connector_rate: float = 1e-5
    train_language: bool = False
    language_rate: float = 3e-6
    train_unet: bool = False
    unet_rate: float = 5e-6
    rank: int = 8
    pooled: str = ZEROS
    drop_share: float = 0.1
    warmup: int = 100
    depth: int = 16
    again: bool = True
    seed: int = 0
    preview_every: int = 100
    save_every: int = 500


def stage_tokens(vlm: VisionLanguage, settings: TrainSettings) -> int:
    """Tokens a picture. Raises ValueError for a number that the model cannot show."""
    if settings.tokens == 0 and vlm.perceiver:
        return vlm.default_tokens()
    wanted = settings.tokens or STAGES[settings.stage].tokens
    vlm.side(wanted)
    return wanted


def chance_of(*parts: Any) -> torch.Generator:
    """A generator on the CPU for this very place of a training: seed, step, row."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True, eq=False)
class Lesson:
    """Pictures of one size with a prompt, a place in the schedule (0 noise to 1 clean) and a noise each.

    records: their numbers in the dataset; hidden: what the language model makes of the prompts, if it was asked before.
    """

    records: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    shares: Tensor
    noise: tuple[torch.Generator, ...]
    hidden: Hidden | None = None


@dataclass(frozen=True, eq=False)
class Lessons:
    """The lessons of a training, each by its number. sizes: of every record that the stage can be trained on."""

    dataset: Dataset
    settings: TrainSettings
    tokens: int
    sizes: dict[int, tuple[int, int]]
    rank: int = 0
    world: int = 1
    drawn: dict[int, list[list[int]]] = field(default_factory=dict, repr=False)

    @property
    def per_epoch(self) -> int:
        """Batches in which every picture comes once."""
        counts = Counter(self.sizes.values())
        return sum(math.ceil(count / self.settings.batch) for count in counts.values())

    def epoch(self, number: int) -> list[list[int]]:
        """Batches of pictures of one size; each picture comes once, those that fill up a batch twice."""
        if number not in self.drawn:
            self.drawn.clear()
            self.drawn[number] = self.shuffled(number)
        return self.drawn[number]

    def shuffled(self, number: int) -> list[list[int]]:
        """An epoch's batches, in an order of its own."""
        batches = []
        for size in sorted(set(self.sizes.values())):
            here = [record for record, other in self.sizes.items() if other == size]
            order = torch.randperm(len(here), generator=chance_of(self.settings.seed, "order", number, size)).tolist()
            count = math.ceil(len(here) / self.settings.batch) * self.settings.batch
            rows = [here[order[i % len(order)]] for i in range(count)]
            batches += [rows[i : i + self.settings.batch] for i in range(0, count, self.settings.batch)]
        if len(set(self.sizes.values())) == 1:
            return batches
        return [
            batches[i] for i in torch.randperm(len(batches), generator=chance_of(self.settings.seed, "mix", number))
        ]

    def of_step(self, step: int) -> Iterator[Lesson]:
        """This process's lessons of a step: `accumulate` of them."""
        for part in range(self.settings.accumulate):
            yield self.lesson(step, (part * self.world + self.rank))

    def lesson(self, step: int, place: int) -> Lesson:
        """The lesson at a place of a step's whole batch."""
        settings, together = self.settings, self.settings.accumulate * self.world
        epoch, number = divmod(step * together + place, self.per_epoch)
        records = tuple(self.epoch(epoch)[number])
        rows = torch.arange(place * settings.batch, (place + 1) * settings.batch)
        chances = [chance_of(settings.seed, "row", step, int(row)) for row in rows]
        draws = torch.stack([torch.rand((), generator=chance) for chance in chances])
        return Lesson(
            records,
            tuple(self.prompt(record, chance) for record, chance in zip(records, chances, strict=True)),
            spread_levels(draws, rows, settings.batch * together),
            tuple(chances),
        )

    def prompt(self, record: int, chance: torch.Generator) -> Prompt:
        """A prompt for a picture, or now and then none, so that guidance has something to lead away from."""
        dropped = float(torch.rand((), generator=chance)) < self.settings.drop_share
        drawn = self.dataset.draw(record, STAGES[self.settings.stage], self.tokens, chance)
        return () if dropped else drawn
