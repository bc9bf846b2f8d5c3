"""What is measured of letters in pictures of the pocket world: what is read, where it stands, and what is around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from palimpsest.nodes.exact_text import TextLines, reading
from pocket import judge as judging
from pocket import metrics, signs, world
from text_control.second_reader import SecondReader
from torch import Tensor

FITS = 0.4  # of correlation: below it, letters stand nowhere
AROUND = 7  # pixels of a board around its letters
COMPARED = reading.ReadSettings(compare=reading.ANY_CASE)  # the world has capitals alone, some of which read as small
Box = tuple[int, int, int, int]  # left, top, right, bottom
LIGHTNESS = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Written:
    """What became of one line: read in its place and where its letters fit best; that place's overlap with its own.

    box: where they fit best; of its own place, where they fit nowhere. second: by another reader, where there is one.
    """

    text: str
    read: str
    exact: float
    ned: float
    exact_anywhere: float
    ned_anywhere: float
    place: float
    box: Box
    exact_second: float = math.nan
    ned_second: float = math.nan


def ink_of(lines: TextLines) -> tuple[Tensor, Box]:
    """(the drawn letters (h, w) in 0..1, their box in the picture: left, top, right, bottom)."""
    drawn = F.avg_pool2d(lines.glyphs[None], 2)[0, 0]
    rows, columns = ((drawn > 0.1).any(axis).nonzero()[:, 0] for axis in (1, 0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return drawn[top:bottom, left:right], (left, top, right, bottom)


def best_fit(picture: Tensor, ink: Tensor) -> tuple[float, int, int]:
    """(correlation, left, top) where letters (h, w), light on dark or dark on light, fit a picture (H, W, 3) best.

    Normalised correlation of the lightness in every window of the letters' size, a margin of 2 pixels around them.
    """
    shape, light = F.pad(ink, (2, 2, 2, 2)), F.pad((picture @ LIGHTNESS)[None, None], (2, 2, 2, 2), mode="replicate")
    template, ones = (shape - shape.mean())[None, None], torch.ones_like(shape)[None, None]
    number = shape.numel()
    mean, square = F.conv2d(light, ones) / number, F.conv2d(light**2, ones) / number
    spread = (number * (square - mean**2).clamp(min=1e-4)).sqrt() * template.norm()
    found = (F.conv2d(light, template) / spread)[0, 0].abs()
    at = int(found.argmax())
    return float(found.max()), at % found.shape[1], at // found.shape[1]


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """IoU of two boxes: left, top, right, bottom."""
    across, down = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return across * down / (area - across * down)


def written(picture: Tensor, lines: TextLines, second: SecondReader | None = None) -> Written:
    """What became of the one line of a picture (H, W, 3)."""
    text = lines.lines[0].text
    (line,) = reading.lines_to_read(lines.size, lines, None, None, reading.places.DOWN)
    ink, box = ink_of(lines)
    fit, left, top = best_fit(picture, ink)
    found = (left, top, left + ink.shape[1], top + ink.shape[0])
    fits = fit > FITS
    moved = replace(line, polygon=line.polygon + torch.tensor([float(left - box[0]), float(top - box[1])]))
    here, there = (reading.read(picture, [each], [text], COMPARED)[0] for each in (line, moved))
    best = max((here, there), key=lambda each: each.ned)
    again = second.read(picture, line, text, COMPARED.compare) if second else None
    more = {"exact_second": float(again.exact), "ned_second": again.ned} if again else {}
    return Written(
        text=text, read=here.text, exact=float(here.exact), ned=here.ned, exact_anywhere=float(best.exact),
        ned_anywhere=best.ned, place=overlap(box, found) if fits else 0.0, box=found if fits else box, **more,
    )  # fmt: skip


def without_board(picture: Tensor, box: Box) -> Tensor:
    """A picture (H, W, 3) whose board around letters is painted over in the colour beside it.

    The judge learned from scenes without signs: of 32 drawn ones with a sign it knows the species of 0.47, of the same
    painted over 0.94, colour, pose, side and place of all.
    """
    height, width = picture.shape[:2]
    left, top = max(0, box[0] - AROUND), max(0, box[1] - AROUND)
    right, bottom = min(width, box[2] + AROUND), min(height, box[3] + AROUND)
    beside = left - 1 if left > 2 else min(right, width - 1)
    found = picture.clone()
    found[top:bottom, left:right] = picture[top:bottom, beside].mean(0)
    return found


def measured(
    pictures: Tensor,
    lines: Sequence[TextLines],
    scenes: list[world.Scene],
    judge: judging.Judge,
    second: SecondReader | None = None,
) -> tuple[dict[str, float], list[Written]]:
    """(means over pictures (n, H, W, 3), each line)."""
    found = [written(picture, each, second) for picture, each in zip(pictures, lines, strict=True)]
    seen = torch.stack([without_board(picture, each.box) for picture, each in zip(pictures, found, strict=True)])
    told = metrics.attribute_success(judge, seen, scenes)
    means = {
        name: sum(getattr(each, name) for each in found) / len(found)
        for name in ("exact", "ned", "exact_anywhere", "ned_anywhere", "place", "exact_second", "ned_second")
    }
    for name, alphabet in (("latin", signs.LETTERS), ("chinese", signs.CHARACTERS)):
        exact = [each.exact for each in found if each.text[0] in alphabet]
        means[f"exact_{name}"] = sum(exact) / len(exact) if exact else float("nan")
    return means | {"rest": sum(told[name] for name in world.CAPTIONED) / len(world.CAPTIONED)}, found
