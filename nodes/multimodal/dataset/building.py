"""Captioned pictures to a dataset's folder: what was found in a picture is filtered, cut out and written (MUMU)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import Tensor

from ....kernels.conditioning_pictures import Box, area, crop, inside, worth_showing
from .dataset import Crop, Dataset, Recipe, Record
from .files import NO_DETECTOR
from .filters import Limits, PictureFilter
from .finders import Finder, Found
from .folder import write_records
from .pictures import WHOLES, write_picture
from .text import is_person

PEOPLE = "man, woman, person, boy, girl, child, people, men, women, lady, gentleman, guy, baby, kid"
HEAD_INSIDE = 0.8  # how much of a head must lie in its person
Heads = Callable[[Tensor], list[tuple[Box, float]]]  # finds heads in a picture, with their scores, best first


@dataclass(frozen=True)
class DatasetSettings(Limits, Recipe):
    """How a dataset is built; see PalimpsestBuildMultimodalDataset for each."""

    detector: str = NO_DETECTOR
    canny: bool = True
    sketch: bool = True
    remove_background: bool = False
    box_threshold: float = 0.35
    text_threshold: float = 0.25
    people: str = PEOPLE
    name: str = "dataset"

    @property
    def recipe(self) -> Recipe:
        """What is written beside the pictures, for the training."""
        return Recipe(**{each.name: getattr(self, each.name) for each in fields(Recipe)})

    @property
    def limits(self) -> Limits:
        """Which pictures are taken."""
        return Limits(**{each.name: getattr(self, each.name) for each in fields(Limits)})

    @property
    def wholes(self) -> tuple[str, ...]:
        """The kinds in which whole pictures are drawn."""
        return tuple(kind for kind in WHOLES if getattr(self, kind))


@dataclass
class Counted:
    """What became of the parts that were found; left_out: of whole pictures, by the reason."""

    kept: int = 0
    too_small: int = 0
    too_large: int = 0
    overlapping: int = 0
    heads: int = 0
    without: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def build_dataset(
    folder: Path,
    pictures: Sequence[Tensor],
    captions: Sequence[str],
    finder: Finder,
    recipe: Recipe,
    wholes: Sequence[str] = tuple(WHOLES),
    *,
    depths: Sequence[Tensor] = (),
    people: Sequence[str] = (),
    heads: Heads | None = None,
    keep: PictureFilter | None = None,
    tell: Callable[[int, str], None] = lambda done, text: None,
) -> tuple[Dataset, Counted]:
    """Write a dataset of pictures (H, W, 3) and their captions; returns it and what was kept and dropped.

    Pictures are taken one after the other, held to 0..1, and not kept.
    wholes: kinds of WHOLES to draw; depths: a depth map (H, W, 3) for each picture, or none at all; heads: finds heads
    in a picture, for crops of `people`. keep: which pictures are taken. tell is called with the number of pictures
    done, and may raise to stop. Raises ValueError where no picture is left.
    """
    keep = keep or PictureFilter(Limits())
    builder = Builder(folder, recipe, tuple(wholes), tuple(people), heads)
    digits, records = max(5, len(str(len(pictures)))), []
    for index, (given, caption) in enumerate(zip(pictures, captions, strict=True)):
        tell(index, f"picture {index + 1} of {len(pictures)}, {builder.counted.kept} crops")
        picture = given.float().cpu().clamp(0, 1)  # here, so that no second copy of all of them is held
        out, found = keep.reason(index, picture, caption), []
        if out is None:
            found = finder(index, picture, caption)
            out = keep.crowd(found, caption)
        if out is not None:
            builder.counted.left_out[out] += 1
            continue
        keep.remember(picture)
        crops = builder.crops(found, picture, caption, f"{index + 1:0{digits}}")
        whole = builder.whole(picture, depths[index] if len(depths) else None, f"{index + 1:0{digits}}")
        file = write_picture(picture, folder, f"pictures/{index + 1:0{digits}}.png")
        records.append(Record(file, caption, (picture.shape[1], picture.shape[0]), crops, whole))
    if not records:
        raise ValueError(
            f"all {len(pictures)} pictures are left out: {told_reasons(builder.counted)}. Widen the limits "
            "(min_picture, max_aspect, alike_bits, min_score, max_text, max_people), or connect other pictures."
        )
    dataset = Dataset(folder, tuple(records), recipe)
    write_records(dataset)
    return dataset, builder.counted


@dataclass(frozen=True, eq=False)
class Builder:
    """Filters what was found, cuts and writes, picture by picture, and counts what became of it."""

    folder: Path
    recipe: Recipe
    wholes: tuple[str, ...]
    people: tuple[str, ...]
    heads: Heads | None
    counted: Counted = field(default_factory=Counted)

    def crops(self, found: Sequence[Found], picture: Tensor, caption: str, name: str) -> tuple[Crop, ...]:
        """The crops of a picture in which something was found, written."""
        kept = self.kept(found, picture)
        heads = []
        if self.heads and any(is_person(caption[found.start : found.end], self.people) for found in kept):
            heads = self.heads(picture)
        crops = tuple(
            self.crop(found, picture, caption[found.start : found.end], heads, f"{name}_{number}")
            for number, found in enumerate(kept, 1)
        )
        self.counted.kept += len(crops)
        self.counted.without += not crops
        return crops

    def kept(self, found: Sequence[Found], picture: Tensor) -> list[Found]:
        """What is worth showing, in the caption's order; the rest is counted."""
        separate, recipe = list(apart(found)), self.recipe
        self.counted.overlapping += len(found) - len(separate)
        kept, (height, width) = [], picture.shape[:2]
        for each in sorted(separate, key=lambda f: f.start):
            if worth_showing(each.box, height, width, recipe.min_side, recipe.max_share):
                kept.append(each)
            elif area(each.box) < max(recipe.min_side**2, 1):
                self.counted.too_small += 1
            else:
                self.counted.too_large += 1
        return kept

    def crop(self, found: Found, picture: Tensor, word: str, heads: list[tuple[Box, float]], name: str) -> Crop:
        """A part of a picture, written, with the head of a person."""
        file = write_picture(shown_part(picture, found), self.folder, f"crops/{name}_{plain(word)}.png")
        person, head_file = is_person(word, self.people), None
        head = head_of(found.box, heads) if person else None
        if head is not None:
            head_file = write_picture(crop(picture, head), self.folder, f"crops/{name}_head.png")
            self.counted.heads += 1
        return Crop(
            word=word,
            start=found.start,
            end=found.end,
            box=found.box,
            score=round(found.score, 4),
            file=file,
            person=person,
            head=head_file,
        )

    def whole(self, picture: Tensor, depth: Tensor | None, name: str) -> dict[str, str]:
        """The files of the whole picture without its looks, by kind."""
        drawn = {kind: WHOLES[kind](picture) for kind in self.wholes} | ({} if depth is None else {"depth": depth})
        return {kind: write_picture(whole, self.folder, f"wholes/{name}_{kind}.png") for kind, whole in drawn.items()}


def apart(found: Sequence[Found]) -> Iterator[Found]:
    """Those whose words do not overlap with those of a better one."""
    taken: list[Found] = []
    for each in sorted(found, key=lambda f: -f.score):
        if not any(each.start < other.end and other.start < each.end for other in taken):
            taken.append(each)
            yield each


def head_of(box: Box, heads: Sequence[tuple[Box, float]]) -> Box | None:
    """The best head that lies in a person's box; None where there is none."""
    return next((head for head, _ in heads if area(head) and inside(head, box) >= HEAD_INSIDE), None)


def shown_part(picture: Tensor, found: Found) -> Tensor:
    """A found part as a picture, all else of it black where it has a mask."""
    return crop(picture if found.mask is None else picture * found.mask[..., None], found.box)


def plain(word: str) -> str:
    """A word that can stand in a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:24] or "crop"


def describe_dataset(dataset: Dataset, counted: Counted) -> str:
    """What is in a dataset and what was dropped, in words."""
    pictures, recipe = len(dataset.records), dataset.recipe
    return (
        f"{pictures} pictures, {counted.kept} crops ({counted.kept / max(pictures, 1):.1f} a picture), "
        f"{counted.heads} heads; dropped: {counted.too_small} smaller than {recipe.min_side} x {recipe.min_side} "
        f"px, {counted.too_large} larger than {100 * recipe.max_share:.0f} % of their picture, "
        f"{counted.overlapping} on words of a better one; {counted.without} pictures have no crop"
        f"{told_people(dataset)}{'; left out: ' * bool(counted.left_out)}{told_reasons(counted)}"
    )


def told_people(dataset: Dataset) -> str:
    """How many pictures show people, where that counts."""
    weight = dataset.recipe.people_weight
    people = sum(record.has_people for record in dataset.records)
    return f"; {people} with people, which come {weight:g} times as often" if weight != 1 else ""


def told_reasons(counted: Counted) -> str:
    """How many whole pictures were left out, and why."""
    return ", ".join(f"{count} {reason}" for reason, count in counted.left_out.most_common())
