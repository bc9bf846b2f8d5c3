"""Captioned pictures to interleaved prompts: crops of a picture, bound to the words of its caption (MUMU, section 4).

A dataset is a plain folder: pictures, the crops cut out of them, the whole pictures without their looks, one line of
JSON for each picture, and the recipe by which prompts are drawn from it. Drawing happens while training, so that a
picture's prompt is another one every time it comes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ....kernels.conditioning_pictures import Box, area, box_around, crop, inside, sketch, varied, worth_showing
from ..interleaved import Picture, Prompt
from .open_detection import Detector, places_of

FORMAT, VERSION = "palimpsest.multimodal_dataset", 1
HEADER, RECORDS, SHEET = "dataset.json", "dataset.jsonl", "contact_sheet.jpg"
PEOPLE = "man, woman, person, boy, girl, child, people, men, women, lady, gentleman, guy, baby, kid"
HEADS, HEAD_INSIDE = "head. face.", 0.8  # what is searched for in people, and how much of it must lie in the person


# ---- what is kept of a picture --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Which crops are kept, and how often what is done with them while training: the paper's numbers.

    least_side: a crop of fewer pixels than its square is dropped; largest_share: as is one of more of the picture than
    this. most_crops: crops in one prompt. head_share, vary_share, whole_share: how often a person is shown by the head
    alone, a picture is varied, and the whole picture stands in the prompt without its looks.
    """

    least_side: int = 150
    largest_share: float = 0.75
    most_crops: int = 3
    head_share: float = 0.7
    vary_share: float = 0.2
    whole_share: float = 0.3


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

    def prompt(self) -> str:
        """The caption with every crop in it, as Multimodal Prompt writes it."""
        text, at = "", 0
        for number, each in enumerate(self.crops, 1):
            text += f"{self.caption[at : each.start]}<image{number}> "
            at = each.start
        return text + self.caption[at:]


@dataclass(frozen=True)
class Stage:
    """One of the paper's two stages of training: crops in a prompt at most (None: the recipe's), tokens a picture."""

    most_crops: int | None
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

    def picture(self, index: int) -> Tensor:
        """A whole picture, (H, W, 3) in 0..1."""
        return read_picture(self.folder / self.records[index].picture)

    def fitting(self, stage: Stage) -> list[int]:
        """The records that a stage can be trained on. Raises ValueError where there are none."""
        found = [i for i, record in enumerate(self.records) if not stage.people or any(c.person for c in record.crops)]
        if not found:
            what = "no crop of a person in it (words under people)" if stage.people else "no picture in it"
            raise ValueError(
                f"the dataset {self.folder.name!r} has {what}: build it from other pictures, or train stage 1."
            )
        return found

    def draw(self, index: int, stage: Stage, tokens: int | None, chance: torch.Generator) -> Prompt:
        """A prompt for a picture: some of its crops before their words, perhaps the whole before all (section 5).

        From 1 to most_crops crops, each number as likely; the paper says "up to".
        """
        record, recipe = self.records[index], self.recipe

        def lucky(share: float) -> bool:
            return float(torch.rand((), generator=chance)) < share

        def shown(file: str, name: str, variable: bool = True) -> Picture:
            pixels = read_picture(self.folder / file)
            if variable and lucky(recipe.vary_share):
                pixels = varied(pixels, chance)
            return Picture(pixels, tokens, 1.0, name)

        pool = [each for each in record.crops if each.person or not stage.people]
        most = min(len(pool), recipe.most_crops if stage.most_crops is None else stage.most_crops)
        count = int(torch.randint(1, most + 1, (), generator=chance)) if most else 0
        chosen = sorted(torch.randperm(len(pool), generator=chance)[:count].tolist())
        parts: list[str | Picture] = []
        if stage.wholes and record.wholes and lucky(recipe.whole_share):
            kinds = sorted(record.wholes)
            kind = kinds[int(torch.randint(len(kinds), (), generator=chance))]
            parts += [shown(record.wholes[kind], kind, False), " "]
        at = 0
        for each in (pool[i] for i in chosen):
            file = each.head if each.head and lucky(recipe.head_share) else each.file
            parts += [record.caption[at : each.start], shown(file, each.word), " "]
            at = each.start
        return merged([*parts, record.caption[at:]])


def merged(parts: Sequence[str | Picture]) -> Prompt:
    """The parts with texts side by side joined, and without empty ones."""
    found: list[str | Picture] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return tuple(found)


# ---- files ----------------------------------------------------------------------------------------------------------


def read_picture(path: Path) -> Tensor:
    """A picture file as (H, W, 3) in 0..1. Raises ValueError for one that is missing or damaged."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 255)
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path.parent.name}/{path.name} of the dataset is missing or damaged: build the dataset again."
        ) from error


def to_image(picture: Tensor) -> Image.Image:
    """(H, W, 3) in 0..1 as a picture of PIL's."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def write_picture(picture: Tensor, folder: Path, file: str) -> str:
    """Write a picture into the dataset's folder; returns `file`."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    to_image(picture).save(path, compress_level=4)
    return file


def lies_within(file: Any) -> bool:
    """Whether a dataset's entry names a file in the dataset's own folder."""
    if not isinstance(file, str) or not file or "\\" in file or ":" in file:
        return False
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts


def record_of(line: str) -> Record:
    """A record of one line. Raises KeyError, TypeError, ValueError for nonsense."""
    said = json.loads(line)
    known = {each.name for each in fields(Crop)}
    crops = tuple(
        Crop(**{k: v for k, v in each.items() if k in known} | {"box": tuple(each["box"])})
        for each in said.get("crops", ())
    )
    record = Record(said["picture"], str(said["caption"]), tuple(said["size"]), crops, dict(said.get("wholes", {})))
    files = [record.picture, *record.wholes.values(), *(c.file for c in crops), *(c.head for c in crops if c.head)]
    outside = next((file for file in files if not lies_within(file)), None)
    if outside is not None:
        raise ValueError(f"{outside!r} does not lie in the dataset's folder")
    if any(not 0 <= c.start < c.end <= len(record.caption) for c in crops):
        raise ValueError("a crop stands outside of its caption")
    return replace(record, crops=tuple(sorted(crops, key=lambda c: c.start)))


def read(folder: Path) -> Dataset:
    """Read a dataset folder. Raises ValueError that names the line that cannot be read."""
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        lines = (folder / RECORDS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder.name} is no dataset of interleaved prompts ({error}): make one with Build Multimodal Dataset."
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ValueError(
            f"{folder.name}/{HEADER} is not of this version's form: build the dataset again, or update Palimpsest."
        )
    try:
        recipe = Recipe(**header["recipe"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder.name}/{HEADER} has a recipe that cannot be read ({error}): correct it.") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records += [record_of(line)] if line.strip() else []
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {folder.name}/{RECORDS} cannot be read ({error}): correct it."
            ) from error
    return Dataset(folder, tuple(records), recipe)


def write_records(dataset: Dataset) -> None:
    """Write the records and the recipe; the pictures are there already."""
    header = {"format": FORMAT, "version": VERSION, "recipe": asdict(dataset.recipe)}
    lines = [json.dumps(asdict(record) | {"prompt": record.prompt()}) for record in dataset.records]
    (dataset.folder / RECORDS).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (dataset.folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


# ---- where the crops come from --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """A part of a picture that characters start..end of the caption name; mask (H, W): the crop is black elsewhere."""

    start: int
    end: int
    box: Box
    score: float = 1.0
    mask: Tensor | None = None


class Finder(Protocol):
    """Finds what a caption names in a picture, (H, W, 3) in 0..1."""

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]: ...


def in_pixels(box: Sequence[float], picture: Tensor) -> Box:
    """A box in 0..1 in whole pixels of a picture."""
    height, width = picture.shape[:2]
    left, top, right, bottom = box
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


@dataclass(frozen=True)
class ByDetector:
    """What a GroundingDINO finds; with words, only what belongs to one of them."""

    detector: Detector
    box_threshold: float = 0.35
    text_threshold: float = 0.25
    words: tuple[str, ...] = ()

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]:
        found = self.detector.detect(picture, caption, self.box_threshold, self.text_threshold)
        here = [word for word in self.words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE)]
        wanted = places_of(here, caption) if self.words else [(0, len(caption))]
        return [
            Found(each.start, each.end, in_pixels(each.box, picture), each.score)
            for each in found
            if any(each.start < end and start < each.end for start, end in wanted)
        ]

    def heads(self, picture: Tensor) -> list[tuple[Box, float]]:
        """Heads and faces anywhere in a picture, best first."""
        found = self.detector.detect(picture, HEADS, self.box_threshold, self.text_threshold)
        return [(in_pixels(each.box, picture), each.score) for each in found]


@dataclass(frozen=True, eq=False)
class ByMask:
    """What masks show: masks[i] (n, h, w) for the n words of picture i, in their order."""

    masks: Sequence[Tensor]
    words: Sequence[Sequence[str]]
    remove: bool = False

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]:
        masks, words = self.masks[index].reshape(-1, *self.masks[index].shape[-2:]), self.words[index]
        same_number(index, "masks", len(masks), words)
        large = torch.nn.functional.interpolate(masks[:, None].float().clamp(0, 1), picture.shape[:2], mode="bilinear")
        boxes = [box_around(mask) for mask in large[:, 0]]
        return [
            Found(*place, box, 1.0, mask if self.remove else None)
            for place, box, mask in zip(places_of(words, caption), boxes, large[:, 0], strict=True)
            if box is not None
        ]


@dataclass(frozen=True, eq=False)
class ByBox:
    """What boxes show: boxes[i], as BOUNDING_BOX carries them, for the words of picture i or by their own labels."""

    boxes: Sequence[Sequence[dict]]
    words: Sequence[Sequence[str]]

    def __call__(self, index: int, picture: Tensor, caption: str) -> list[Found]:
        boxes = self.boxes[index]
        words = self.words[index] or [str(box.get("label", "")) for box in boxes]
        same_number(index, "boxes", len(boxes), words)
        height, width = picture.shape[:2]
        found = []
        for place, box in zip(places_of(words, caption), boxes, strict=True):
            left, top = max(0, round(box["x"])), max(0, round(box["y"]))
            right, bottom = min(width, round(box["x"] + box["width"])), min(height, round(box["y"] + box["height"]))
            found.append(Found(*place, (left, top, right, bottom), float(box.get("score", 1.0))))
        return found


def same_number(index: int, what: str, count: int, words: Sequence[str]) -> None:
    """Raise ValueError where a picture has another number of words than of masks or boxes."""
    if count != len(words):
        raise ValueError(
            f"picture {index + 1} has {count} {what} and {len(words)} words ({', '.join(words) or 'none'}): give a "
            "word of the caption for each, separated by commas, in the same order."
        )


# ---- the whole picture without its looks ----------------------------------------------------------------------------


def canny(picture: Tensor) -> Tensor:
    """The picture's edges in white on black, by the detector that the host's own Canny node uses."""
    from kornia.filters import canny as edges

    return edges(picture.movedim(-1, 0)[None])[1][0].movedim(0, -1).expand_as(picture).contiguous()


WHOLES: dict[str, Callable[[Tensor], Tensor]] = {"canny": canny, "sketch": sketch}


# ---- building -------------------------------------------------------------------------------------------------------


@dataclass
class Counted:
    """What became of the parts that were found."""

    kept: int = 0
    too_small: int = 0
    too_large: int = 0
    overlapping: int = 0
    heads: int = 0
    without: int = 0


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


def is_person(word: str, people: Sequence[str]) -> bool:
    """Whether a phrase is about a person: one of its words is among `people`."""
    return not set(re.findall(r"[\w'-]+", word.lower())).isdisjoint(people)


def shown_part(picture: Tensor, found: Found) -> Tensor:
    """A found part as a picture, all else of it black where it has a mask."""
    return crop(picture if found.mask is None else picture * found.mask[..., None], found.box)


def build(
    folder: Path,
    pictures: Sequence[Tensor],
    captions: Sequence[str],
    finder: Finder,
    recipe: Recipe,
    wholes: Sequence[str] = tuple(WHOLES),
    depths: Sequence[Tensor] = (),
    people: Sequence[str] = (),
    heads: Callable[[Tensor], list[tuple[Box, float]]] | None = None,
    tell: Callable[[int, str], None] = lambda done, text: None,
) -> tuple[Dataset, Counted]:
    """Write a dataset of pictures (H, W, 3) and their captions; returns it and what was kept and dropped.

    Pictures are taken one after the other, held to 0..1, and not kept.
    wholes: kinds of WHOLES to draw; depths: a depth map (H, W, 3) for each picture, or none at all; heads: finds heads
    in a picture, for crops of `people`. tell is called with the number of pictures done, and may raise to stop.
    """
    counted, records = Counted(), []
    digits = max(5, len(str(len(pictures))))
    for index, (given, caption) in enumerate(zip(pictures, captions, strict=True)):
        picture = given.float().cpu().clamp(0, 1)  # here, so that no second copy of all of them is held
        tell(index, f"picture {index + 1} of {len(pictures)}, {counted.kept} crops")
        name, (height, width) = f"{index + 1:0{digits}}", picture.shape[:2]
        kept = []
        found = finder(index, picture, caption)
        separate = list(apart(found))
        counted.overlapping += len(found) - len(separate)
        for each in sorted(separate, key=lambda f: f.start):
            if not worth_showing(each.box, height, width, recipe.least_side, recipe.largest_share):
                small = area(each.box) < max(recipe.least_side**2, 1)
                counted.too_small += small
                counted.too_large += not small
                continue
            kept.append(each)
        in_picture = heads(picture) if heads and any(is_person(caption[f.start : f.end], people) for f in kept) else []
        crops = []
        for number, each in enumerate(kept, 1):
            word = caption[each.start : each.end]
            file = write_picture(shown_part(picture, each), folder, f"crops/{name}_{number}_{plain(word)}.png")
            person, head_file = is_person(word, people), None
            head = head_of(each.box, in_picture) if person else None
            if head is not None:
                head_file = write_picture(crop(picture, head), folder, f"crops/{name}_{number}_head.png")
                counted.heads += 1
            crops.append(Crop(word, each.start, each.end, each.box, round(each.score, 4), file, person, head_file))
        counted.kept += len(crops)
        counted.without += not crops
        drawn = {kind: WHOLES[kind](picture) for kind in wholes} | ({"depth": depths[index]} if len(depths) else {})
        files = {kind: write_picture(whole, folder, f"wholes/{name}_{kind}.png") for kind, whole in drawn.items()}
        records.append(
            Record(
                write_picture(picture, folder, f"pictures/{name}.png"), caption, (width, height), tuple(crops), files
            )
        )
    dataset = Dataset(folder, tuple(records), recipe)
    write_records(dataset)
    return dataset, counted


def plain(word: str) -> str:
    """A word that can stand in a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:24] or "crop"


def describe(dataset: Dataset, counted: Counted) -> str:
    """What is in a dataset and what was dropped, in words."""
    pictures, recipe = len(dataset.records), dataset.recipe
    return (
        f"{pictures} pictures, {counted.kept} crops ({counted.kept / max(pictures, 1):.1f} a picture), "
        f"{counted.heads} heads; dropped: {counted.too_small} smaller than {recipe.least_side} x {recipe.least_side} "
        f"px, {counted.too_large} larger than {100 * recipe.largest_share:.0f} % of their picture, "
        f"{counted.overlapping} on words of a better one; {counted.without} pictures have no crop"
    )


# ---- the contact sheet ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a sheet: pictures with a word under each, and a line of text below."""

    cells: tuple[tuple[Image.Image, str], ...]
    text: str


def sheet(rows: Sequence[Row], side: int = 144, columns: int = 6) -> Tensor:
    """Rows of pictures as one IMAGE (1, H, W, 3) in 0..1; pictures that find no place in `columns` are left out."""
    from PIL import ImageDraw, ImageFont

    gap, line = 6, 17
    font = ImageFont.load_default(12)
    width = columns * (side + gap) + gap
    letters = max(20, width // 7)
    height = sum(side + 2 * line + gap + line * math.ceil(len(row.text) / letters) for row in rows) or line
    page = Image.new("RGB", (width, height), "white")
    pen, top = ImageDraw.Draw(page), 0
    for row in rows:
        for column, (picture, word) in enumerate(row.cells[:columns]):
            small, left = picture.convert("RGB"), gap + column * (side + gap)
            small.thumbnail((side, side))
            small = small.resize(tuple(max(1, round(s * side / max(picture.size))) for s in picture.size))
            page.paste(small, (left, top + gap))
            pen.text((left, top + gap + side + 1), word[: side // 6], fill=(90, 90, 90), font=font)
        top += side + 2 * line
        for start in range(0, len(row.text), letters):
            pen.text((gap, top), row.text[start : start + letters], fill=(20, 20, 20), font=font)
            top += line
        top += gap
    return torch.from_numpy(np.asarray(page, dtype=np.float32) / 255)[None]


def overview(dataset: Dataset, most: int = 12) -> Tensor:
    """A contact sheet of up to `most` pictures, spread over the dataset: IMAGE (1, H, W, 3)."""
    count = len(dataset.records)
    chosen = sorted({round(i * (count - 1) / max(min(most, count) - 1, 1)) for i in range(min(most, count))})
    return sheet([row_of(dataset, index) for index in chosen])


def row_of(dataset: Dataset, index: int) -> Row:
    """A picture with its boxes, its crops and heads, its wholes, and the prompt with all crops."""
    from PIL import ImageDraw

    record = dataset.records[index]
    picture = to_image(dataset.picture(index))
    pen = ImageDraw.Draw(picture)
    for each in record.crops:
        pen.rectangle(each.box, outline=(230, 60, 40), width=max(1, max(picture.size) // 150))
    cells = [(picture, PurePosixPath(record.picture).name)]
    for number, each in enumerate(record.crops, 1):
        cells.append((to_image(read_picture(dataset.folder / each.file)), f"{number} {each.word} {each.score:.2f}"))
        if each.head:
            cells.append((to_image(read_picture(dataset.folder / each.head)), f"{number} head"))
    cells += [(to_image(read_picture(dataset.folder / file)), kind) for kind, file in sorted(record.wholes.items())]
    return Row(tuple(cells), record.prompt())
