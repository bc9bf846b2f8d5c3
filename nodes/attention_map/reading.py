"""Reading a record: maps of the chosen words, the masks made of them, and the share that lies outside of a mask."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import attention_map as maths
from ...kernels.scripts import split_list
from .. import host
from ..quoting import quoted
from ..settings import Settings
from .record import AttentionRecord, RecordedRun, span

EVERY_LEVEL = "all"
LEVELS = {"1/1 of the latent": 1, "1/2 of the latent": 2, "1/4 of the latent": 4, "1/8 of the latent": 8}
NORMALISE = {
    "each word by itself": maths.by_itself,
    "words against each other": maths.against_each_other,
    "as measured": maths.as_measured,
}


def mean_mass(run: RecordedRun, levels: Iterable[host.Grid], start: float, end: float, size: host.Grid) -> Tensor:
    """(B, W, H, W) mean of a run's recorded steps within a share of its steps, and of some of its levels.

    Raises ValueError if nothing was recorded there.
    """
    maps = []
    for grid in levels:
        level = run.levels[grid]
        inside = level[list(span(len(level), start, end))]
        inside = inside[~inside.flatten(1).isnan().any(1)]
        if len(inside):
            maps.append(inside.mean(0))
    if not maps:
        raise ValueError(
            f"nothing was recorded between {start:g} and {end:g} of the steps: widen start_percent and end_percent "
            "here, or those of Attention Map."
        )
    return maths.averaged(maps, size)


def normalised(mass: Tensor, normalise: str, record: AttentionRecord) -> Tensor:
    """Mass (B, W, H, W) as it is shown, 0..1. Raises ValueError where a single word has none to compete with."""
    if NORMALISE[normalise] is maths.against_each_other and mass.shape[1] < 2:
        raise ValueError(
            f"normalise is {normalise!r}, and only {record.words[0]!r} was recorded: choose more words in Select Words "
            "(* takes all of them), or take 'each word by itself'."
        )
    return NORMALISE[normalise](mass)


def chosen_levels(run: RecordedRun, levels: str) -> list[host.Grid]:
    """The grids of a level. Raises ValueError, naming those there are, if the network does not look there."""
    if levels == EVERY_LEVEL:
        return list(run.levels)
    height, width = run.samples.shape[-2:]
    factors = {grid: round(math.sqrt(height * width / (grid[0] * grid[1]))) for grid in run.levels}
    found = [grid for grid, factor in factors.items() if factor == LEVELS[levels]]
    if not found:
        known = ", ".join(f"1/{factor}" for factor in sorted(set(factors.values())))
        raise ValueError(f"levels is {levels!r}, and this record has {known} of the latent: choose one of them or all.")
    return found


def chosen_words(record: AttentionRecord, asked: str) -> list[int]:
    """The recorded words of a comma-separated list, all if it is empty. Raises ValueError for one that is not there."""
    names = split_list(asked)
    known = {word.casefold(): i for i, word in enumerate(record.words)}
    for name in names:
        if name.casefold() not in known:
            raise ValueError(
                f"{quoted(name)} was not recorded; the words of this record are {', '.join(record.words)}."
            )
    return list(dict.fromkeys(known[name.casefold()] for name in names)) or list(range(len(record.words)))


@dataclass(frozen=True, eq=False)
class Reading:
    """Maps of B pictures and the W chosen words: mass (B, W, H, W) as measured, shown in 0..1, mask (B, H, W) binary.

    soft (B, H, W): the largest of the words' shown maps; leaks (B, W), None without a mask of the user's, which shares
    `overlap` (intersection over union) with this one.
    """

    words: tuple[str, ...]
    mass: Tensor
    shown: Tensor
    mask: Tensor
    thresholds: Tensor
    leaks: Tensor | None
    outside: float
    overlap: float | None = None

    @property
    def soft(self) -> Tensor:
        """One map for all words."""
        return self.shown.amax(1)

    @property
    def leakage(self) -> float:
        """Mean over pictures and words; -1 without a mask."""
        return -1.0 if self.leaks is None else self.leaks.nanmean().item()

    def describe(self) -> str:
        """What was measured, word by word."""
        parts = []
        for i, word in enumerate(self.words):
            leak = "" if self.leaks is None else f", {self.leaks[:, i].nanmean():.0%} of it outside the mask"
            parts.append(f"{word}: {self.mass[:, i].mean():.2%} of the attention{leak}")
        text = "; ".join([*parts, f"the map's mask covers {self.mask.mean():.0%} of the picture"])
        if self.leaks is not None:
            text += f"; leakage {self.leakage:.3f} (a word that looks everywhere alike: {self.outside:.3f})"
            if self.overlap is not None and not math.isnan(self.overlap):
                text += f"; the map's mask and yours share {self.overlap:.0%} (intersection over union)"
        return text


@dataclass(frozen=True)
class ReadSettings(Settings):
    """Which words, layers and steps are read, and how they are shown; see PalimpsestReadAttentionMap."""

    words: str = ""
    levels: str = EVERY_LEVEL
    start_percent: float = 0.5
    end_percent: float = 1.0
    normalise: str = "each word by itself"
    threshold: float = 0.0
    clean: int = 2
    opacity: float = 0.65
    label: bool = True


def read(
    record: AttentionRecord,
    settings: ReadSettings,
    samples: Tensor | None = None,
    size: host.Grid | None = None,
    mask: Tensor | None = None,
) -> Reading:
    """Read a record at the size of a picture (None: of the latent's). threshold 0 finds one for each map by itself.

    Raises ValueError for what is not recorded, for an empty span of steps, and for a mask of another batch.
    """
    host.require_span(settings.start_percent, settings.end_percent)
    run = record.of(samples)
    chosen = chosen_words(record, settings.words)
    cells = tuple(run.samples.shape[-2:])
    cell = host.cell_of(size, cells) if size else host.CELL  # where there is one, the VAE left the sides' rest out
    encoded = tuple((cell or host.CELL) * side for side in cells)
    size = size or encoded
    levels = chosen_levels(run, settings.levels)
    mass = mean_mass(run, levels, settings.start_percent, settings.end_percent, encoded if cell else size)
    mass = run.of_video(host.beyond(mass, size) if cell else mass)
    mask = host.as_encoded(mask, cells) if mask is not None and size == encoded else mask
    shown, mass = normalised(mass, settings.normalise, record)[:, chosen], mass[:, chosen]
    thresholds = maths.otsu(shown) if settings.threshold == 0 else torch.full(shown.shape[:2], settings.threshold)
    found = maths.cleaned((shown > thresholds[..., None, None]).float(), settings.clean).amax(1)
    leaks, outside = (None, 0.0) if mask is None else leakage_of(mass, mask)
    return Reading(
        words=tuple(record.words[i] for i in chosen),
        mass=mass,
        shown=shown,
        mask=found,
        thresholds=thresholds,
        leaks=leaks,
        outside=outside,
        overlap=None if mask is None else shared(found, mask),
    )


def shared(found: Tensor, mask: Tensor) -> float:
    """How much of the masks (B, H, W) that a map gave and a person's is the same, as a mean over pictures."""
    return maths.overlap(found, host.picture_rows(mask.to(found), len(found), *found.shape[-2:])[:, 0]).nanmean().item()


def leakage_of(mass: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """The share of each map (B, W, H, W) outside of a mask, (B, W), and that of a word that looks everywhere alike."""
    inside = host.picture_rows(mask.to(mass), len(mass), *mass.shape[-2:])
    return maths.leakage(mass, inside), 1 - inside.mean().item()
