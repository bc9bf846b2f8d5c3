"""A folder of pictures whose text somebody wrote down: texts.jsonl, a line for each picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import files as storage
from ..foreign import file_within, json_line, lines_of
from ..picture_files import read_picture
from ..quoting import quoted
from ..said import Said

RECORDS = "texts.jsonl"
FOLDER = "palimpsest_texts"  # in the host's input folder, and in its output folder
MOST_RECORDS, MOST_LINES, MOST_CORNERS, MOST_LETTERS = 1_000_000, 64, 64, 200
FARTHEST = 1 << 16  # pixels
NOTHING = f"no folder: put one with {RECORDS} into input/{FOLDER}"
HINT = f"put a folder with {RECORDS} and its pictures into input/{FOLDER}"


@dataclass(frozen=True, eq=False)
class Written:
    """A line in a picture: its text, its corners (n, 2) in pixels, x and y, and whether it is to be learned."""

    text: str
    polygon: Tensor
    read: bool = True


@dataclass(frozen=True)
class Record:
    """A picture's file, its caption, and the lines in it."""

    picture: str
    caption: str
    lines: tuple[Written, ...]


@dataclass(frozen=True)
class Texts:
    """A folder of such pictures."""

    folder: Path
    records: tuple[Record, ...]

    def picture(self, number: int) -> Tensor:
        """A picture, (H, W, 3) in 0..1. Raises ValueError for what is no picture file inside of the folder."""
        return read_picture(file_within(self.folder, self.records[number].picture))


def found() -> dict[str, Path]:
    """Every folder by its name."""
    import folder_paths

    roots = (folder_paths.get_input_directory(), folder_paths.get_output_directory())
    return storage.folders_with(RECORDS, (Path(root) / FOLDER for root in roots))


def listed() -> list[str]:
    """Names of the folders, as the node offers them; a sentence where there are none."""
    return sorted(found()) or [NOTHING]


def read_texts(name: str) -> Texts:
    """A folder by its name. Raises ValueError for a name of none, and for a line that cannot be read, by its number."""
    known = found()
    if name not in known:
        have = ", ".join(sorted(known)) or "nothing"
        raise ValueError(f"there is no folder {quoted(name)} in input/{FOLDER}, only {have}: {HINT}.")
    folder = known[name]
    records = tuple(records_of(folder))
    if not records:
        raise ValueError(f"{name}/{RECORDS} has no lines: write one for each picture.")
    return Texts(folder, records)


def records_of(folder: Path) -> Iterator[Record]:
    """The records of a folder. Raises ValueError that names the line."""
    for number, line in enumerate(lines_of(folder / RECORDS), 1):
        if not line.strip():
            continue
        try:
            if number > MOST_RECORDS:
                raise ValueError(f"at most {MOST_RECORDS} lines are read")
            yield record_of(Said.of(json_line(line)))
        except ValueError as error:
            raise ValueError(
                f"line {number} of {folder.name}/{RECORDS} cannot be read ({str(error).rstrip('.')}): correct it."
            ) from error


def record_of(said: Said) -> Record:
    """A record. Raises ValueError that says what of it cannot be read."""
    given = said.parts("lines", list)
    if len(given) > MOST_LINES:
        raise ValueError(f"it has {len(given)} lines of text, at most {MOST_LINES} are read")
    lines = (written_of(Said.of(each, f"text {number}")) for number, each in enumerate(given, 1))
    return Record(said.file("picture"), said.text("caption"), tuple(lines))


def written_of(said: Said) -> Written:
    """One line of text; one that is not to be read needs no text."""
    read = said.values.get("read", True)
    if not isinstance(read, bool):
        raise said.refuse("read", "true or false")
    text = said.text("text", MOST_LETTERS) if read else str(said.values.get("text", ""))[:MOST_LETTERS]
    return Written(" ".join(text.split()), polygon_of(said), read)


def polygon_of(said: Said) -> Tensor:
    """The corners of a line: 3 to MOST_CORNERS points of numbers, with some space between them."""
    points = said.value("polygon")
    if not isinstance(points, list) or not 3 <= len(points) <= MOST_CORNERS or not all(map(is_point, points)):
        raise said.refuse("polygon", f"a list of 3 to {MOST_CORNERS} corners [x, y] in pixels")
    corners = torch.tensor(points, dtype=torch.float32)
    if float((corners.amax(0) - corners.amin(0)).min()) < 1:
        raise said.refuse("polygon", "a polygon of at least a pixel")
    return corners


def is_point(value: object) -> bool:
    """Whether a value of JSON is a pair of numbers that can be a place in a picture."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(each) in (int, float) and math.isfinite(each) and abs(each) <= FARTHEST for each in value)
    )
