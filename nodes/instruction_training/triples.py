"""What is learned from: a picture, an instruction, and what the picture should become; of a folder, or connected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.scripts import split_lines
from ..colours import rgb
from ..files import folders_with
from ..foreign import file_within, json_line, lines_of
from ..host.cancelling import Cancellable
from ..picture_files import read_picture, require_pixels
from ..quoting import quoted
from ..said import Said

LINES = "triples.jsonl"
FOLDERS = "palimpsest_datasets"  # in the host's output folder, and in its input folder
DEPTH = 3
CONNECTED = "(the connected pictures)"
MOST_TRIPLES = 1_000_000
SAME_SHAPE = 0.02  # how much the proportions of a picture and of its result may differ


@dataclass(frozen=True)
class Line:
    """One line of a folder's triples.jsonl: files of the folder, and the instruction.

    mask: what is to change; expressed: what the instruction means here, in words.
    """

    picture: str
    instruction: str
    result: str
    mask: str | None = None
    expressed: str = ""


@dataclass(frozen=True, eq=False)
class Triple:
    """A picture, its result, both (1, H, W, 3) in 0..1, and the instruction.

    mask (1, H, W): what is to change; expressed: what the instruction means here, in words, empty where nobody said.
    """

    picture: Tensor
    instruction: str
    result: Tensor
    mask: Tensor | None = None
    expressed: str = ""


@dataclass(frozen=True)
class Source:
    """What is learned from: how many triples, whether any has a mask, and how they are read, one after the other."""

    count: int
    masked: bool
    read: Callable[[], Iterator[Triple]]


# ---- from a folder --------------------------------------------------------------------------------------------------


def folders() -> dict[str, Path]:
    """Every folder of triples by name: in output/palimpsest_datasets, then in input/palimpsest_datasets."""
    import folder_paths

    roots = (folder_paths.get_output_directory(), folder_paths.get_input_directory())
    return folders_with(LINES, (Path(root) / FOLDERS for root in roots), DEPTH)


def folder_names() -> list[str]:
    """Names of the folders, as the node offers them, after "(the connected pictures)"."""
    return [CONNECTED, *sorted(folders())]


def in_folder(name: str) -> Source:
    """The triples of a folder, its lines read. Raises ValueError for no such folder, and that names a line at fault."""
    known = folders()
    if name not in known:
        have = ", ".join(sorted(known)) or "nothing"
        raise ValueError(
            f"there is no folder of triples {quoted(name)} in output/{FOLDERS} or input/{FOLDERS}, only {have}: put a "
            f"folder with {LINES} there and refresh, or connect pictures, results and instructions."
        )
    folder, found = known[name], []
    for number, line in enumerate(lines_of(folder / LINES), 1):
        try:
            if number > MOST_TRIPLES:
                raise ValueError(f"no more than {MOST_TRIPLES} lines are read")
            found += [line_of(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(
                f"line {number} of {folder.name}/{LINES} cannot be read ({str(error).rstrip('.')}): correct it."
            ) from error
    if not found:
        raise ValueError(
            f'{folder.name}/{LINES} has no lines: write one for each triple, {{"picture": "a.png", "instruction": '
            '"make it blue", "result": "b.png"}.'
        )
    return Source(len(found), any(line.mask for line in found), lambda: from_folder(folder, found))


def line_of(line: str) -> Line:
    """One line. Raises ValueError that says what of it cannot be read."""
    said = Said.of(json_line(line))
    mask = None if said.values.get("mask") is None else said.file("mask")
    expressed = "" if said.values.get("expressed") is None else said.text("expressed")
    return Line(said.file("picture"), said.text("instruction"), said.file("result"), mask, expressed)


def from_folder(folder: Path, lines: Sequence[Line]) -> Iterator[Triple]:
    """The triples of a folder, read one after the other. Raises ValueError as read_picture, and as `fitting`."""

    def read(file: str) -> Tensor:
        found = read_picture(file_within(folder, file))
        require_pixels(found.shape[1], found.shape[0], f"{file} of {folder.name}")
        return found[None]

    for number, line in enumerate(lines, 1):
        mask = None if line.mask is None else read(line.mask).mean(3)
        triple = Triple(read(line.picture), line.instruction, read(line.result), mask, line.expressed)
        yield fitting(triple, f"line {number}")


# ---- from the graph -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Connected:
    """What is connected: IMAGEs (B, H, W, C), each one or a batch, instructions, MASKs, and expressed texts."""

    pictures: Sequence[Tensor]
    results: Sequence[Tensor]
    instructions: Sequence[str]
    masks: Sequence[Tensor] = ()
    expressed: Sequence[str] = ()

    def source(self) -> Source:
        """They as what is learned from. Raises ValueError as `triples`."""
        found = self.triples()
        return Source(len(found), bool(self.masks), lambda: iter(found))

    def triples(self) -> list[Triple]:
        """Raises ValueError where they are not as many, and as `fitting`."""
        pictures, results = one_by_one(self.pictures, "pictures"), one_by_one(self.results, "results")
        if not pictures or len(pictures) != len(results):
            raise ValueError(
                f"there are {len(pictures)} pictures and {len(results)} results: connect a result for each picture, in "
                "their order, or choose a folder."
            )
        words = texts_for(len(pictures), self.instructions, "instructions")
        masks = masks_for(len(pictures), self.masks)
        said = [""] * len(pictures)
        if any(text.strip() for text in self.expressed):
            said = texts_for(len(pictures), self.expressed, "texts in expressed")
        made = map(Triple, pictures, words, results, masks, said)
        return [fitting(triple, f"triple {number}") for number, triple in enumerate(made, 1)]


def one_by_one(images: Sequence[Tensor], name: str) -> list[Tensor]:
    """IMAGEs as pictures (1, H, W, 3). Raises ValueError for one of too many pixels, or too few."""
    with Cancellable():
        found = [picture for batch in images for picture in rgb(batch, name).split(1)]
    for number, picture in enumerate(found, 1):
        require_pixels(picture.shape[2], picture.shape[1], f"picture {number} of {name}")
    return found


def texts_for(count: int, given: Sequence[str], what: str) -> list[str]:
    """A text for each of `count` triples: as many, the lines of one, or one for all. Raises ValueError."""
    texts = list(given)
    if len(texts) == 1:
        texts = split_lines(texts[0])
        texts = texts * count if len(texts) == 1 else texts
    texts = [" ".join(text.split()) for text in texts]
    if len(texts) != count or not all(texts):
        raise ValueError(
            f"there are {sum(map(bool, texts))} {what} for {count} pictures: give one for each in their order, "
            "one text with a line for each, or one line for all."
        )
    return texts


def masks_for(count: int, given: Sequence[Tensor]) -> list[Tensor | None]:
    """A mask (1, H, W) for each of `count` triples, or None for each. Raises ValueError for any other number."""
    found = [mask for batch in given for mask in batch.reshape(-1, *batch.shape[-2:]).split(1)]
    if not found:
        return [None] * count
    found = found * count if len(found) == 1 else found
    if len(found) != count:
        raise ValueError(f"there are {len(found)} masks for {count} pictures: give one for each, or one for all.")
    return found


def fitting(triple: Triple, name: str) -> Triple:
    """The triple. Raises ValueError where its result is cut otherwise than its picture, or its mask is empty."""
    (height, width), (high, wide) = triple.picture.shape[1:3], triple.result.shape[1:3]
    if abs(width * high / (height * wide) - 1) > SAME_SHAPE:
        raise ValueError(
            f"the result of {name} has {wide} x {high} pixels, its picture {width} x {height}: they must show the same "
            "part of the scene; cut both alike."
        )
    if triple.mask is not None and not bool((triple.mask > 0).any()):
        raise ValueError(f"the mask of {name} is black all over: paint what is to change white, or leave it out.")
    if not all(bool(torch.isfinite(part).all()) for part in (triple.picture, triple.result)):
        raise ValueError(f"{name} has NaN in its pictures: look at the node that makes them.")
    return triple
