"""A dataset's folder: pictures, the crops cut out of them, one line of JSON for each picture, and the recipe."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from .dataset import Crop, Dataset, Recipe, Record

FORMAT, VERSION = "palimpsest.multimodal_dataset", 1
HEADER, RECORDS, SHEET = "dataset.json", "dataset.jsonl", "contact_sheet.jpg"


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


def read_dataset(folder: Path) -> Dataset:
    """Read a dataset folder. Raises ValueError that names the line that cannot be read."""
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        lines = (folder / RECORDS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder.name} is no dataset of interleaved prompts ({error}): make one with Build Multimodal Dataset."
        ) from error
    recipe = recipe_of(header, f"{folder.name}/{HEADER}")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records += [record_of(line)] if line.strip() else []
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {folder.name}/{RECORDS} cannot be read ({error}): correct it."
            ) from error
    return Dataset(folder, tuple(records), recipe)


def recipe_of(header: Any, file: str) -> Recipe:
    """The recipe in a dataset's header. Raises ValueError that names the file for another form of it."""
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ValueError(f"{file} is not of this version's form: build the dataset again, or update Palimpsest.")
    try:
        return Recipe(**header["recipe"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} has a recipe that cannot be read ({error}): correct it.") from error


def write_records(dataset: Dataset) -> None:
    """Write the records and the recipe; the pictures are there already."""
    header = {"format": FORMAT, "version": VERSION, "recipe": asdict(dataset.recipe)}
    lines = [json.dumps(asdict(record) | {"prompt": record.prompt()}) for record in dataset.records]
    (dataset.folder / RECORDS).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (dataset.folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
