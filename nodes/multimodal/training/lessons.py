"""What a training of a multimodal encoder is shown, step by step: pictures of one size, their prompts, their noise.

Every draw depends on the seed, the step and the row alone: a training that was interrupted goes on as if it had not
been, and processes that share a batch learn what one process learns from all of it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....kernels.denoising_loss import spread_levels
from ...training import generator_at
from ..dataset import STAGES, Dataset
from ..interleaved import Prompt
from ..vlm import Hidden
from .saying import Said, leaving_out, words_of
from .settings import TrainSettings


@dataclass(frozen=True, eq=False)
class Lesson:
    """Pictures of one size with a prompt, a share of the schedule (0 noise to 1 clean) and a generator of noise each.

    records: their numbers in the dataset; hidden: what the language model makes of the prompts, if it was asked before;
    wholes: the prompts with the words that these leave out; said: what the text encoder says, where that is learned.
    """

    records: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    shares: Tensor
    generators: tuple[torch.Generator, ...]
    hidden: Hidden | None = None
    wholes: tuple[Prompt, ...] = ()
    said: tuple[Said, ...] = ()


def times(weight: float, count: int) -> int:
    """How often so many pictures come at a weight: once at least, where there are any."""
    return max(1, round(weight * count)) if count else 0


def in_words(prompt: Prompt) -> Prompt:
    """A prompt's words as one text, its pictures left out; the prompt itself where it has no words."""
    words = words_of(prompt)
    return (" ".join(words),) if words else prompt


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
        """Batches in which every picture comes once, those with people as often as the dataset says."""
        return sum(math.ceil(count / self.settings.batch_size) for count in self.counts.values())

    @functools.cached_property
    def counts(self) -> dict[tuple[int, int], int]:
        """How many pictures of each size come in an epoch."""
        people = Counter(size for record, size in self.sizes.items() if self.is_weighted(record))
        weight = self.dataset.recipe.people_weight
        return {
            size: count - people[size] + times(weight, people[size])
            for size, count in Counter(self.sizes.values()).items()
        }

    def is_weighted(self, record: int) -> bool:
        """Whether a picture counts as one with people; where all are, or weigh as others do, it makes no difference."""
        weight, stage = self.dataset.recipe.people_weight, STAGES[self.settings.stage]
        return weight != 1 and not stage.people and self.dataset.records[record].has_people

    @property
    def per_step(self) -> int:
        """Batches in one step of the optimisers, of all processes together."""
        return self.settings.gradient_accumulation * self.world

    def epoch(self, number: int) -> list[list[int]]:
        """Batches of pictures of one size; each picture comes once, or by its weight; some again to fill up a batch."""
        if number not in self.drawn:
            self.drawn.clear()
            self.drawn[number] = self.shuffled(number)
        return self.drawn[number]

    def shuffled(self, number: int) -> list[list[int]]:
        """An epoch's batches, in an order of its own."""
        seed, sizes = self.settings.seed, sorted(set(self.sizes.values()))
        batches = [batch for size in sizes for batch in self.batches_of(size, number)]
        if len(sizes) == 1:
            return batches
        return [batches[i] for i in torch.randperm(len(batches), generator=generator_at(seed, "mix", number))]

    def batches_of(self, size: tuple[int, int], number: int) -> list[list[int]]:
        """An epoch's batches of pictures of one size."""
        batch = self.settings.batch_size
        generator = generator_at(self.settings.seed, "order", number, size)
        here = self.weighted([record for record, other in self.sizes.items() if other == size], generator)
        order = torch.randperm(len(here), generator=generator).tolist()
        count = math.ceil(len(here) / batch) * batch
        rows = [here[order[i % len(order)]] for i in range(count)]
        return [rows[i : i + batch] for i in range(0, count, batch)]

    def weighted(self, records: list[int], generator: torch.Generator) -> list[int]:
        """The pictures of an epoch: those with people as often as the recipe says, which ones by chance."""
        weight = self.dataset.recipe.people_weight
        people = [record for record in records if self.is_weighted(record)]
        if not people:
            return records
        whole, rest = divmod(times(weight, len(people)), len(people))
        some = torch.randperm(len(people), generator=generator)[:rest].tolist()
        others = [record for record in records if not self.is_weighted(record)]
        return others + people * whole + [people[i] for i in some]

    def of_step(self, step: int) -> Iterator[Lesson]:
        """This process's lessons of a step."""
        for part in range(self.settings.gradient_accumulation):
            yield self.lesson(step, part * self.world + self.rank)

    def lesson(self, step: int, place: int) -> Lesson:
        """The lesson at a place of a step's whole batch."""
        seed, batch = self.settings.seed, self.settings.batch_size
        epoch, number = divmod(step * self.per_step + place, self.per_epoch)
        records = tuple(self.epoch(epoch)[number])
        rows = torch.arange(place * batch, (place + 1) * batch)
        generators = tuple(generator_at(seed, "row", step, int(row)) for row in rows)
        draws = torch.stack([torch.rand((), generator=generator) for generator in generators])
        prompts = wholes = tuple(self.prompt(*each) for each in zip(records, generators, strict=True))
        if self.settings.course.before_drawing:
            prompts = tuple(leaving_out(*each) for each in zip(wholes, generators, strict=True))
        shares = spread_levels(draws, rows, batch * self.per_step)
        return Lesson(records, prompts, shares, generators, wholes=wholes)

    def prompt(self, record: int, generator: torch.Generator) -> Prompt:
        """A prompt for a picture, or now and then none, so that guidance has something to lead away from.

        Now and then its words alone, so that prompts without pictures keep their meaning.
        """
        dropped = float(torch.rand((), generator=generator)) < self.settings.prompt_dropout
        drawn = self.dataset.draw(record, STAGES[self.settings.stage], self.tokens, generator)
        share = self.settings.picture_dropout
        if share and float(torch.rand((), generator=generator)) < share:  # at 0 all draws are those of earlier versions
            drawn = in_words(drawn)
        return () if dropped else drawn
