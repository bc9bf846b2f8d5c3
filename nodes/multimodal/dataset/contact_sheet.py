"""Contact sheets of a dataset: pictures with what was cut out of them, to be looked at by people."""

from __future__ import annotations

from pathlib import PurePosixPath

from torch import Tensor

from ... import plots
from .dataset import Dataset


def overview(dataset: Dataset, most: int = 12) -> Tensor:
    """A contact sheet of up to `most` pictures, spread over the dataset: IMAGE (1, H, W, 3)."""
    count = len(dataset.records)
    chosen = sorted({round(i * (count - 1) / max(min(most, count) - 1, 1)) for i in range(min(most, count))})
    return plots.sheet(row_of(dataset, index) for index in chosen)


def row_of(dataset: Dataset, index: int) -> plots.Row:
    """A picture with its boxes, its crops and heads, its wholes, and the prompt with all crops."""
    record = dataset.records[index]
    picture = plots.boxed(dataset.picture(index), (crop.box for crop in record.crops))
    cells = [(picture, PurePosixPath(record.picture).name)]
    for number, crop in enumerate(record.crops, 1):
        cells.append((dataset.read(crop.file), f"{number} {crop.word} {crop.score:.2f}"))
        if crop.head:
            cells.append((dataset.read(crop.head), f"{number} head"))
    cells += [(dataset.read(file), kind) for kind, file in sorted(record.wholes.items())]
    return plots.Row(cells, record.prompt())
