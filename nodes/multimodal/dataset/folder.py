"""A dataset's folder: pictures, the crops cut out of them, one line of JSON for each picture, and the recipe."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ...foreign import lines_of, object_of
from .dataset import Dataset, Recipe
from .lines import recipe_of, record_of

FORMAT, VERSION = "palimpsest.multimodal_dataset", 1
HEADER, RECORDS, SHEET = "dataset.json", "dataset.jsonl", "contact_sheet.jpg"
MOST_RECORDS = 10_000_000  # twice the paper's five million pictures


def read_dataset(folder: Path) -> Dataset:
    """Read a dataset folder, unless the run is cancelled. Raises ValueError that names the line that cannot be read."""
    header = object_of(folder / HEADER, "make a dataset with Build Multimodal Dataset")
    recipe, records = recipe_in(header, f"{folder.name}/{HEADER}"), []
    for number, line in enumerate(lines_of(folder / RECORDS), 1):
        try:
            if number > MOST_RECORDS:
                raise ValueError(f"no more than {MOST_RECORDS} lines are read")
            records += [record_of(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(
                f"line {number} of {folder.name}/{RECORDS} cannot be read ({str(error).rstrip('.')}): correct it."
            ) from error
    return Dataset(folder, tuple(records), recipe)


def recipe_in(header: dict, file: str) -> Recipe:
    """The recipe in a dataset's header. Raises ValueError that names the file for another form of it."""
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ValueError(f"{file} is not of this version's form: build the dataset again, or update Palimpsest.")
    try:
        return recipe_of(header.get("recipe"))
    except ValueError as error:
        raise ValueError(f"{file} has a recipe that cannot be read ({error}): correct it.") from error


def write_records(dataset: Dataset) -> None:
    """Write the records and the recipe; the pictures are there already."""
    header = {"format": FORMAT, "version": VERSION, "recipe": asdict(dataset.recipe)}
    lines = [json.dumps(asdict(record) | {"prompt": record.prompt()}) for record in dataset.records]
    (dataset.folder / RECORDS).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (dataset.folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
