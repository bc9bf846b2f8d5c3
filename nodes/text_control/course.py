"""The course of a training as pictures: what it wrote on the way, and how that reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import plots
from ..training.course import shown_previews
from ..training.fitting import History
from .examples import Example
from .fit import PREVIEWED
from .reading import read_in


def sheet(model: Any, vae: Any, history: History, examples: Sequence[Example]) -> tuple[Tensor, str]:
    """(IMAGE (1, H, W, 3): a row for each previewed picture, and under each of its drawings what is read in it; how
    many lines the last drawings have right, in words).
    """
    shown, rows, right, lines = shown_previews(history), [], 0, 0
    for number, example in enumerate(examples[:PREVIEWED] if shown else ()):
        cells = []
        for preview in shown:
            latent = model.model.process_latent_out(preview.latents[number])
            picture = vae.decode(latent)[0].cpu().float().clamp(0, 1)
            exact, found = read_in(picture, example)
            cells.append((picture, f"{preview.epoch}: {' / '.join(each.text for each in found) or 'nothing'}"))
        right, lines = right + exact, lines + len(found)
        rows.append(plots.Row(cells, " / ".join(line.text for line in example.lines) or example.prompt))
    told = f"{right} of {lines} lines of the last previews read exactly" if lines else ""
    return plots.sheet(rows, side=256, columns=max(1, len(shown))), told
