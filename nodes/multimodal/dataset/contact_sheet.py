"""Contact sheets: pictures with what was cut out of them, to be looked at by people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .dataset import Dataset
from .pictures import read_picture, to_image


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
