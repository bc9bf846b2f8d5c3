"""Attention maps: record while the host samples where words act, and read the records as pictures and masks."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import attention_map as maths
from .. import host
from ..cross_attention import masking as cross_attention
from ..words.words import ChosenWords

NAME = "palimpsest_attention_map"
KEPT_RUNS = 8
Grid = tuple[int, int]

# ---- what is recorded -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """Where W words acted in one sampling run of T steps and B pictures.

    samples (B, C, H, W): the latent that the run gave, by which a reader knows it. levels: by the grid (h, w) of the
    layers, the share of a place's attention that went to each word, (T, B, W, h, w) float32 on the CPU, averaged over
    heads, layers and the model calls of a step; nan in steps that were not recorded. Empty if no prompt held the words.
    """

    samples: Tensor
    levels: Mapping[Grid, Tensor]

    @property
    def bytes(self) -> int:
        """Memory that the maps take."""
        return sum(level.numel() * level.element_size() for level in self.levels.values())


class AttentionRecord:
    """What recorders saw of some words: the latest runs of the sampler that they were given to.

    The node that makes it has run before the sampler does, so it is filled later; runs are told apart by the latent
    they gave, so that a cached sampler, a second sampler or another seed never shows another picture's maps.
    """

    def __init__(self, words: tuple[str, ...], needs_samples: bool = True):
        self.words, self.needs_samples = words, needs_samples
        self.runs: list[RecordedRun] = []

    def add(self, run: RecordedRun) -> None:
        """Keep a finished run; the oldest of too many goes."""
        self.runs = [*self.runs[1 - KEPT_RUNS :], run]

    def of(self, samples: Tensor | None) -> RecordedRun:
        """The run that gave this LATENT. Raises ValueError if there is none, or if it never saw the words."""
        if samples is None and self.needs_samples:
            raise ValueError(
                "samples is not connected: connect the LATENT of the sampler that uses Attention Map's model, so that "
                "the map is read after sampling and belongs to that picture."
            )
        found = self.runs if samples is None else [run for run in self.runs if same_latent(run.samples, samples)]
        if not found:
            state = "holds no run of a sampler yet" if not self.runs else "holds no run that gave these samples"
            raise ValueError(
                f"the attention record {state}: give the model of Attention Map to the sampler and connect that "
                "sampler's own LATENT to samples (not a resized or composited one). If both are so, the host has "
                "forgotten the run: change the seed to sample again."
            )
        if not found[-1].levels:
            raise ValueError(
                f"the words {', '.join(map(repr, self.words))} were in no prompt that was sampled, or in none at the "
                "recorded steps: theirs was averaged, or encoded by another CLIP or LoRA. Sample with the positive "
                "output of Select Words; combining, concatenating and areas are fine."
            )
        return found[-1]


def same_latent(kept: Tensor, given: Tensor) -> bool:
    """Whether a LATENT is what a run gave, in whatever precision the host hands it on."""
    return kept.shape == given.shape and torch.equal(kept.to(given.dtype), given.cpu())


class Sums:
    """The maps of a run in the making, on the device: by grid, sums (T, B, W, h, w) and how often each place was seen.

    starts: where the words' prompt begins in each sampled one. values: indicator values, which all layers of one shape
    share.
    """

    def __init__(self, sigmas: Tensor):
        self.sigmas = tuple(float(s) for s in sigmas[:-1])
        self.sums: dict[Grid, Tensor] = {}
        self.counts: dict[Grid, Tensor] = {}
        self.starts: dict[host.Prompt, tuple[int, ...]] = {}
        self.values: dict[tuple, Tensor] = {}

    def add(self, sigma: float, mass: Tensor, grid: Grid, places: Tensor | None) -> None:
        """One layer's mass (B, W, n) of one prompt: on the tokens `places` of the grid, or on all of it."""
        if grid not in self.sums:
            shape = (len(self.sigmas), *mass.shape[:2], grid[0] * grid[1])
            self.sums[grid], self.counts[grid] = mass.new_zeros(shape), mass.new_zeros(shape[0], 1, 1, shape[-1])
        where = slice(None) if places is None else places.to(mass.device)
        step = host.nearest_level(self.sigmas, sigma)
        self.sums[grid][step, ..., where] += mass.to(self.sums[grid])
        self.counts[grid][step, ..., where] += 1

    def maps(self) -> dict[Grid, Tensor]:
        """RecordedRun.levels. Places that no prompt covered, next to some that one did, count as 0."""
        found = {}
        for grid, sums in self.sums.items():
            counts = self.counts[grid]
            mean = torch.where(counts.amax(-1, keepdim=True) > 0, sums / counts.clamp_min(1), torch.nan)
            found[grid] = mean.unflatten(-1, grid).to("cpu", torch.float32)
        return found


# ---- what the host calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeepRun:
    """OUTER_SAMPLE wrapper: a fresh memory for every sampling run; one that comes to its end goes into the record."""

    name: str
    record: AttentionRecord

    def __call__(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs
    ):
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        if len(sigmas) < 2:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        options[self.name] = sums = Sums(sigmas)
        try:
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(self.name, None)
        self.record.add(RecordedRun(samples.detach().to("cpu", torch.float32, copy=True), sums.maps()))
        return samples


@dataclass(frozen=True)
class RecordWords:
    """A recorder of CrossAttention: the mass that words draw in some layers, while the noise level is in the window."""

    name: str
    words: ChosenWords
    layers: frozenset[host.LayerKey]
    window: tuple[float, float]

    def __call__(self, attend: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, options: dict) -> None:
        sums, call = options.get(self.name), options.get(cross_attention.NAME)
        if sums is None or call is None or host.layer_key(options) not in self.layers:
            return
        if not self.window[1] < call.sigma <= self.window[0]:
            return
        with torch.no_grad():
            self.look(sums, call, attend, query, key, options)

    def look(self, sums: Sums, call: host.Call, attend: Callable, query: Tensor, key: Tensor, options: dict) -> None:
        """Ask the layer for the words' mass and add it up, prompt by prompt."""
        chunks, pictures = host.chunk_rows(options, len(query))
        starts = self.starts(sums, call, key.shape[1])
        if not any(starts):
            return
        grid = tuple(options["activations_shape"][-2:])
        if grid[0] * grid[1] != query.shape[1]:
            raise ValueError(
                f"Attention Map cannot tell where a layer of {grid[1]} x {grid[0]} places looks: it asks for "
                f"{query.shape[1]} here because another node merges or tiles them (ToMe, HyperTile): take it out."
            )
        heads = options["n_heads"]
        mass = self.mass(sums, starts, attend, key, heads, pictures).unflatten(0, (chunks, pictures))
        for chunk, area in ((chunk, call.areas[chunk]) for chunk in range(chunks) if starts[chunk]):
            whole = grid if area is None else host.whole_grid(area, grid)
            places = None if area is None else area.tokens(whole, *grid)
            sums.add(call.sigma, mass[chunk].mT, whole, places)

    def starts(self, sums: Sums, call: host.Call, keys: int) -> tuple[tuple[int, ...], ...]:
        """For every prompt of a call, the keys at which the words' prompt begins, in each copy that the host made."""
        joined = math.lcm(*(prompt.length for prompt in call.prompts))
        if joined > keys:
            raise ValueError(
                f"a prompt of {joined} tokens reaches a layer as {keys}: another node shortens the text that the model "
                "sees, and Attention Map cannot find words in the rest: take that node out."
            )
        for prompt in (prompt for prompt in call.prompts if prompt not in sums.starts):
            sums.starts[prompt] = () if prompt.text is None else self.words.offsets(prompt.text)
        return tuple(
            tuple(copy + start for copy in range(0, joined, prompt.length) for start in sums.starts[prompt])
            for prompt in call.prompts
        )

    def mass(self, sums: Sums, starts: tuple, attend: Callable, key: Tensor, heads: int, pictures: int) -> Tensor:
        """(R, N, W): the layer's own attention of indicator values, for as many words at a time as a head is wide."""
        width, found = key.shape[-1] // heads, []
        for first in range(0, len(self.words.words), width):
            positions = self.words.positions[first : first + width]
            name = (starts, first, pictures, *key.shape[1:], heads, key.dtype, key.device)
            if name not in sums.values:
                values = [
                    maths.indicator_values(
                        [[start + place for start in row for place in places] for places in positions],
                        key.shape[1],
                        heads,
                        width,
                    )
                    for row in starts
                ]
                sums.values[name] = torch.stack(values).repeat_interleave(pictures, 0).to(key)
            found.append(maths.mass_of_output(attend(sums.values[name]), len(positions), heads))
        return torch.cat(found, -1)


LAYERS: dict[str, Callable[[host.AttentionLayer], bool]] = {
    "all": lambda layer: True,
    "encoder": lambda layer: layer.block == "input",
    "middle": lambda layer: layer.block == "middle",
    "decoder": lambda layer: layer.block == "output",
}


def record_words(
    model: Any, words: ChosenWords, layers: str, start_percent: float, end_percent: float, needs_samples: bool = True
) -> tuple[Any, AttentionRecord]:
    """A clone of the model that records where words act, and the record. Its pictures are the model's, bit for bit.

    Raises ValueError for models without such layers, and for an empty span of steps.
    """
    from comfy.patcher_extension import WrappersMP

    if start_percent >= end_percent:
        raise ValueError(
            f"start_percent {start_percent:g} and end_percent {end_percent:g} leave no step to record: move them apart."
        )
    chosen = [layer for layer in host.cross_attention_layers(model, "Attention Map") if LAYERS[layers](layer)]
    if not chosen:
        raise ValueError(f"this model has no layer that looks at the prompt in its {layers}: set layers to all.")
    sampling = model.get_model_object("model_sampling")
    window = (sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent))
    record, name = AttentionRecord(words.words, needs_samples), f"{NAME}.{uuid.uuid4().hex}"
    patched = model.clone()
    recorder = RecordWords(name, words, frozenset(layer.key for layer in chosen), window)
    cross_attention.attach(patched, chosen, recorders=(recorder,))
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, name, KeepRun(name, record))
    return patched, record


# ---- a picture's own latents ----------------------------------------------------------------------------------------


def span(steps: int, start: float, end: float) -> range:
    """The steps that a share of them covers, at least one."""
    first = min(math.floor(start * steps), steps - 1)
    return range(first, max(math.ceil(end * steps), first + 1))


def spread(levels: int, steps: int, start: float, end: float) -> list[int]:
    """Which of `steps` steps to visit: `levels` of them, evenly spread over a span of the steps, each once."""
    within = span(steps, start, end)
    wanted = min(levels, len(within))
    return [within[math.floor((i + 0.5) * len(within) / wanted)] for i in range(wanted)]


def find_words(
    model: Any,
    trajectory: host.Trajectory,
    words: ChosenWords,
    positive: list,
    levels: int,
    start_percent: float,
    end_percent: float,
    callback: Any = None,
) -> AttentionRecord:
    """Where words of a prompt are in a picture: the model looks at its inverted latents, `levels` times.

    start_percent, end_percent: the span of the trajectory's steps, 0 the noisiest. Raises ValueError for another
    architecture's trajectory, an empty span, and a prompt without the words.
    """
    if trajectory.layout != host.layout_fingerprint(model):
        raise ValueError(
            "the picture was inverted with another architecture than this model: invert it again with this model."
        )
    if start_percent >= end_percent:
        raise ValueError(
            f"start_percent {start_percent:g} and end_percent {end_percent:g} leave no step to look at: move them "
            "apart."
        )
    patched, record = record_words(model, words, "all", 0.0, 1.0, needs_samples=False)
    steps = spread(levels, trajectory.steps, start_percent, end_percent)
    sigmas = torch.tensor([*(trajectory.sigmas[step] for step in steps), 0.0])
    picture = model.model.process_latent_out(trajectory.latents[-1].clone())
    visit = host.VisitLevels(trajectory.latents[steps])
    host.sample(patched, visit, picture, sigmas=sigmas, positive=positive, callback=callback)
    record.of(None)
    return record


# ---- reading --------------------------------------------------------------------------------------------------------

EVERY_LEVEL = "all"
LEVELS = {"1/1 of the latent": 1, "1/2 of the latent": 2, "1/4 of the latent": 4, "1/8 of the latent": 8}
NORMALISE = {
    "each word by itself": maths.by_itself,
    "words against each other": maths.against_each_other,
    "as measured": maths.as_measured,
}
COMPETING = maths.against_each_other


def mean_mass(run: RecordedRun, levels: Iterable[Grid], start: float, end: float, size: Grid) -> Tensor:
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
            f"nothing was recorded between {start:g} and {end:g} of the steps: widen start and end here, or the span "
            "of Attention Map."
        )
    return maths.averaged(maps, size)


def chosen_levels(run: RecordedRun, levels: str) -> list[Grid]:
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
    names = [word.strip() for word in asked.replace("\n", ",").split(",") if word.strip()]
    known = {word.casefold(): i for i, word in enumerate(record.words)}
    for name in names:
        if name.casefold() not in known:
            raise ValueError(f"{name!r} was not recorded; the words of this record are {', '.join(record.words)}.")
    return list(dict.fromkeys(known[name.casefold()] for name in names)) or list(range(len(record.words)))


@dataclass(frozen=True, eq=False)
class Reading:
    """Maps of B pictures and the W chosen words: mass (B, W, H, W) as measured, shown in 0..1, mask (B, H, W) binary.

    soft (B, H, W): the largest of the words' shown maps; leaks (B, W), None without a mask of the user's.
    """

    words: tuple[str, ...]
    mass: Tensor
    shown: Tensor
    mask: Tensor
    thresholds: Tensor
    leaks: Tensor | None
    outside: float

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
        return text


def read(
    record: AttentionRecord,
    samples: Tensor | None,
    size: Grid | None,
    words: str,
    levels: str,
    start: float,
    end: float,
    normalise: str,
    threshold: float,
    clean: int,
    mask: Tensor | None,
) -> Reading:
    """Read a record at the size of a picture (None: of the latent's). threshold 0 finds one for each map by itself.

    Raises ValueError for what is not recorded, and for a mask of another batch.
    """
    run = record.of(samples)
    chosen = chosen_words(record, words)
    size = size or tuple(8 * side for side in run.samples.shape[-2:])
    mass = mean_mass(run, chosen_levels(run, levels), start, end, size)
    if NORMALISE[normalise] is COMPETING and mass.shape[1] < 2:
        raise ValueError(
            f"normalise is {normalise!r}, and only {record.words[0]!r} was recorded: choose more words in Select Words "
            "(* takes all of them), or take 'each word by itself'."
        )
    shown, mass = NORMALISE[normalise](mass)[:, chosen], mass[:, chosen]
    thresholds = maths.otsu(shown) if threshold == 0 else torch.full(shown.shape[:2], threshold)
    found = maths.cleaned((shown > thresholds[..., None, None]).float(), clean).amax(1)
    leaks, outside = None, 0.0
    if mask is not None:
        inside = host.picture_rows(mask, len(mass), *size)
        leaks, outside = maths.leakage(mass, inside), 1 - inside.mean().item()
    return Reading(tuple(record.words[i] for i in chosen), mass, shown, found, thresholds, leaks, outside)


# ---- drawing --------------------------------------------------------------------------------------------------------


def drawn(reading: Reading, picture: Tensor | None, opacity: float, label: bool) -> Tensor:
    """IMAGE (B * W, H, W, 3): every word's map over every picture, picture by picture, each with its word written on.

    picture (1 or B, H, W, 3 or more); None draws the maps alone. Raises ValueError for another batch.
    """
    pictures, words = reading.shown.shape[:2]
    heat = maths.heat_colours(reading.shown)
    if picture is not None:
        if len(picture) not in (1, pictures):
            raise ValueError(
                f"the image has {len(picture)} pictures, the record has {pictures}: connect the pictures that were "
                "sampled, or a single one."
            )
        weights = picture.new_tensor((0.299, 0.587, 0.114))
        grey = (picture[..., :3].cpu().float() @ weights.cpu().float())[:, None, ..., None]
        heat = torch.lerp(grey.expand(pictures, words, -1, -1, 3), heat, opacity)
    rows = heat.flatten(0, 1).clamp(0, 1)
    if not label:
        return rows
    return torch.stack([labelled(row, reading.words[i % words]) for i, row in enumerate(rows)])


def labelled(picture: Tensor, text: str) -> Tensor:
    """A picture (H, W, 3) with a word in its upper left corner."""
    from PIL import Image, ImageDraw, ImageFont

    height = picture.shape[0]
    image = Image.fromarray((picture * 255).round().byte().numpy())
    font = ImageFont.load_default(max(10, height // 16))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((4, 3), text, font=font)
    draw.rectangle((left - 4, top - 3, right + 4, bottom + 3), fill=(0, 0, 0))
    draw.text((4, 3), text, fill=(255, 255, 255), font=font)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(picture.shape).to(picture.dtype) / 255
