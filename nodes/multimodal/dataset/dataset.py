"""Interleaved prompts of captioned pictures: crops of a picture, bound to the words of its caption (MUMU, section 4).

Prompts are drawn while training, so that a picture's prompt is another one every time it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ....kernels.conditioning_pictures import Box, varied
from ...foreign import file_within
from ...settings import Settings
from ..interleaved import Picture, Prompt
from .pictures import read_picture


@dataclass(frozen=True)
class Recipe(Settings):
    """Which crops are kept, and how often what is done with them while training: the paper's numbers.

    min_side: a crop of fewer pixels than its square is dropped; max_share: as is one of more of the picture than
    this. max_crops: crops in one prompt. head_share, vary_share, whole_share: how often a person is shown by the head
    alone, a crop is varied (in the paper wholes are, too), and the whole picture stands in the prompt without its
    looks. people_weight: how often a picture with a crop of a person comes, beside one without.
    """

    min_side: int = 150
    max_share: float = 0.75
    max_crops: int = 3
    head_share: float = 0.7
    vary_share: float = 0.2
    whole_share: float = 0.3
    people_weight: float = 1.0


RANGES = {  # what a recipe may say, as the node's inputs do
    "min_side": (1, 4096),
    "max_share": (0.05, 1.0),
    "max_crops": (1, 8),
    "head_share": (0.0, 1.0),
    "vary_share": (0.0, 1.0),
    "whole_share": (0.0, 1.0),
    "people_weight": (0.1, 20.0),
}


@dataclass(frozen=True)
class Crop:
    """A part of a picture for characters start..end of its caption; box in pixels, files in the dataset's folder."""

    word: str
    start: int
    end: int
    box: Box
    score: float
    file: str
    person: bool = False
    head: str | None = None


@dataclass(frozen=True)
class Record:
    """A picture, its caption, its crops in the caption's order, and its whole by kind (canny, sketch, depth)."""

    picture: str
    caption: str
    size: tuple[int, int]
    crops: tuple[Crop, ...] = ()
    wholes: dict[str, str] = field(default_factory=dict)

    @property
    def has_people(self) -> bool:
        """Whether one of its crops shows a person."""
        return any(crop.person for crop in self.crops)

    def prompt(self) -> str:
        """The caption with every crop in it, as Multimodal Prompt writes it."""
        text, at = "", 0
        for number, each in enumerate(self.crops, 1):
            text += f"{self.caption[at : each.start]}<image{number}> "
            at = each.start
        return text + self.caption[at:]


@dataclass(frozen=True)
class Stage:
    """One of the paper's two stages of training.

    max_crops: in a prompt (None: the recipe's). tokens: a picture. wholes: whether the whole picture may stand in it.
    people: whether only people are shown.
    """

    max_crops: int | None
    tokens: int
    wholes: bool
    people: bool


STAGES = {
    "1: several pictures": Stage(None, 324, True, False),
    "2: one face or person": Stage(1, 1296, False, True),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A folder of interleaved prompts."""

    folder: Path
    records: tuple[Record, ...]
    recipe: Recipe

    def read(self, file: str) -> Tensor:
        """A picture file of the folder, (H, W, 3) in 0..1. Raises ValueError as file_within and read_picture."""
        return read_picture(file_within(self.folder, file))

    def picture(self, index: int) -> Tensor:
        """A whole picture, (H, W, 3) in 0..1. Raises ValueError as read, and for another size than its line says."""
        record = self.records[index]
        found = self.read(record.picture)
        if found.shape[1::-1] != record.size:
            height, width, _ = found.shape
            raise ValueError(
                f"{record.picture} of the dataset {self.folder.name!r} has {width} x {height} pixels, its line says "
                f"{record.size[0]} x {record.size[1]}: correct the line, or put the picture back that it was made of."
            )
        return found

    def fitting(self, stage: Stage) -> list[int]:
        """The records that a stage can be trained on. Raises ValueError where there are none."""
        found = [i for i, record in enumerate(self.records) if not stage.people or record.has_people]
        if not found:
            what = "no crop of a person in it (words under people)" if stage.people else "no picture in it"
            raise ValueError(
                f"the dataset {self.folder.name!r} has {what}: build it from other pictures, or train stage 1."
            )
        return found

    def draw(self, index: int, stage: Stage, tokens: int | None, generator: torch.Generator) -> Prompt:
        """A prompt for a picture: some of its crops before their words, perhaps the whole before all (section 5).

        tokens: of each picture in it.
        """
        record, at = self.records[index], 0
        crops = self.some_crops(record, stage, generator)
        parts = self.drawn_whole(record, tokens, generator) if stage.wholes and record.wholes else []
        for crop in crops:
            parts += [record.caption[at : crop.start], self.drawn_crop(crop, tokens, generator), " "]
            at = crop.start
        return merged([*parts, record.caption[at:]])

    def some_crops(self, record: Record, stage: Stage, generator: torch.Generator) -> list[Crop]:
        """From 1 to max_crops of a record's crops, each number as likely; the paper says "up to"."""
        pool = [crop for crop in record.crops if crop.person or not stage.people]
        most = min(len(pool), self.recipe.max_crops if stage.max_crops is None else stage.max_crops)
        count = int(torch.randint(1, most + 1, (), generator=generator)) if most else 0
        chosen = sorted(torch.randperm(len(pool), generator=generator)[:count].tolist())
        return [pool[i] for i in chosen]

    def drawn_whole(self, record: Record, tokens: int | None, generator: torch.Generator) -> list[str | Picture]:
        """Now and then the whole picture without its looks, in one of its kinds, and a space."""
        if not happens(self.recipe.whole_share, generator):
            return []
        kinds = sorted(record.wholes)
        kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
        return [Picture(self.read(record.wholes[kind]), tokens, 1.0, kind), " "]

    def drawn_crop(self, crop: Crop, tokens: int | None, generator: torch.Generator) -> Picture:
        """A crop, or the head of its person, varied now and then."""
        file = crop.head if crop.head and happens(self.recipe.head_share, generator) else crop.file
        pixels = self.read(file)
        if happens(self.recipe.vary_share, generator):
            pixels = varied(pixels, generator)
        return Picture(pixels, tokens, 1.0, crop.word)


def happens(share: float, generator: torch.Generator) -> bool:
    """Whether something happens that does in this share of all cases."""
    return float(torch.rand((), generator=generator)) < share


def merged(parts: Sequence[str | Picture]) -> Prompt:
    """The parts with texts side by side joined, and without empty ones."""
    found: list[str | Picture] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return tuple(found)
