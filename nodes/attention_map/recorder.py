"""Recording while the host samples: layers are asked for the words' share of their attention, and it is summed up."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import attention_map as maths
from .. import host
from ..cross_attention import attach
from ..settings import Settings
from ..words import ChosenWords, copies, joined_length, shortened
from .record import AttentionRecord, RecordedRun

NAME, TECHNIQUE = "palimpsest_attention_map", "Attention Map"

Starts = tuple[tuple[int, ...], ...]  # for every prompt of a call, the keys at which the words' prompt begins


class Sums:
    """The maps of a run in the making, on the device: by grid, sums (T, B, W, h w) and how often places were seen."""

    def __init__(self, sigmas: Tensor):
        self.sigmas = tuple(float(s) for s in sigmas[:-1])
        self.sums: dict[host.Grid, Tensor] = {}
        self.counts: dict[host.Grid, Tensor] = {}

    def add(self, call: host.ModelCall, mass: Tensor, grid: host.Grid, tokens: Tensor | None) -> None:
        """One layer's mass (B, W, n) of one prompt of a call: on some tokens of the grid, or on all of it."""
        if grid not in self.sums:
            pictures = len(mass) if call.frames.shown is None else call.clip
            shape = (len(self.sigmas), pictures, mass.shape[1], grid[0] * grid[1])
            self.sums[grid], self.counts[grid] = mass.new_zeros(shape), mass.new_zeros(*shape[:2], 1, shape[-1])
        where = slice(None) if tokens is None else tokens.to(mass.device)
        step = host.nearest_level(self.sigmas, call.sigma)
        sums, counts, mass = self.sums[grid][step], self.counts[grid][step], mass.to(self.sums[grid])
        if call.frames.shown is None:
            sums[..., where] += mass
            counts[..., where] += 1
            return
        for frame, of_frame in zip(call.frames.shown, mass, strict=True):
            sums[frame, :, where] += of_frame
            counts[frame, :, where] += 1

    def maps(self) -> dict[host.Grid, Tensor]:
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
    """OUTER_SAMPLE wrapper: a sampling run that comes to its end goes into the record."""

    name: str
    record: AttentionRecord

    def __call__(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs
    ):
        if len(sigmas) < 2:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        sums = host.run_of(executor.class_obj.model_options).kept(self.name, lambda: Sums(sigmas))
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        ratio = host.video_ratio(executor.class_obj.model_patcher.model)
        self.record.add(RecordedRun(samples.detach().to("cpu", torch.float32, copy=True), sums.maps(), ratio))
        return samples


@dataclass(frozen=True, eq=False)
class Sight:
    """A layer that looks at the prompt: its grid, rows of a prompt, heads, keys (R, M, C), and its attention.

    attend: what the picture gets for any values (R, M, C) -> (R, N, C), asked for in the rows of some chunks; the rows
    of the others may be anything finite. frames: of a video, whose places N are those of one frame after the other.
    """

    call: host.ModelCall
    grid: host.Grid
    pictures: int
    heads: int
    key: Tensor
    attend: Callable[[Tensor, tuple[int, ...]], Tensor]
    frames: int = 1


@dataclass(frozen=True)
class RecordWords:
    """A recorder of CrossAttention: the mass that words draw in some layers, while the noise level is in the window."""

    name: str
    words: ChosenWords
    layers: frozenset[host.LayerKey]
    window: host.Window

    def __call__(self, attend: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, options: dict) -> None:
        call = host.call_of(options)
        if call is None or None in call.prompts or host.layer_key(options) not in self.layers:
            return
        _, pictures = host.chunk_rows(options, len(query))

        def every_row(values: Tensor, chunks: tuple[int, ...]) -> Tensor:
            return attend(values)

        sight = Sight(call, tuple(options["activations_shape"][-2:]), pictures, options["n_heads"], key, every_row)
        self.look(sight, places=query.shape[1])

    def at_joint(self, attention: host.JointAttention, attend: Callable[[Tensor, tuple[int, ...]], Tensor]) -> None:
        """A transformer's layer: what its picture's tokens see of the words."""
        call, sequence, heads = attention.call, attention.sequence, attention.key.shape[1]
        if attention.layer not in self.layers:
            return
        flat = attention.key[:, 0, :, :1].expand(-1, -1, heads * attention.key.shape[-1])  # its shape is asked for
        frames = sequence.frames if sequence.apart else 1  # elsewhere they are layers of one picture
        grid = (sequence.frames // frames * sequence.grid[0], sequence.grid[1])

        def apart(values: Tensor, chunks: tuple[int, ...]) -> Tensor:
            return attend(values.unflatten(2, (heads, -1)).transpose(1, 2), chunks)

        sight = Sight(call, grid, call.pictures, heads, flat, attend=apart, frames=frames)
        self.look(sight, places=sequence.places)

    def look(self, sight: Sight, places: int) -> None:
        """Ask the layer for the words' mass and add it up, prompt by prompt, in a run that KeepRun has begun."""
        call, grid = sight.call, sight.grid
        sums = call.run.things.get(self.name)
        if sums is None or not call.within(self.window):
            return
        starts = self.starts(call, sight.key.shape[1])
        if not any(starts):
            return
        if sight.frames * grid[0] * grid[1] != places:
            raise ValueError(
                f"Attention Map cannot tell where a layer of {grid[1]} x {grid[0]} places looks: it asks for "
                f"{places} here because another node merges or tiles them (ToMe, HyperTile): take it out."
            )
        with torch.no_grad():
            mass = self.mass(sight, starts).unflatten(1, (sight.frames, -1)).flatten(0, 1)
        mass = mass.unflatten(0, (call.chunks, sight.pictures * sight.frames))
        for chunk, area in ((chunk, call.areas[chunk]) for chunk in range(call.chunks) if starts[chunk]):
            whole = grid if area is None else host.whole_grid(area, grid)
            tokens = None if area is None else area.tokens(whole, *grid)
            sums.add(call, mass[chunk].mT, whole, tokens)

    def starts(self, call: host.ModelCall, keys: int) -> Starts:
        """Where the words' prompt begins in each copy of every prompt that the host made."""
        if joined_length(call) > keys:
            raise shortened(call, keys)
        return tuple(
            tuple(copy + start for copy in begins for start in self.words.starts(prompt, call.run))
            for prompt, begins in zip(call.prompts, copies(call), strict=True)
        )

    def mass(self, sight: Sight, starts: Starts) -> Tensor:
        """(R, N, W): the layer's own attention of indicator values, for as many words at a time as a head is wide."""
        heads, key, found = sight.heads, sight.key, []
        chunks = tuple(
            chunk for chunk, begins in enumerate(starts) if begins
        )  # an image's attention is dear: no others
        width, words = key.shape[-1] // heads, self.words.positions
        for first in range(0, len(words), width):
            some = words[first : first + width]
            name = (self.name, starts, first, sight.pictures, *key.shape[1:], heads, key.dtype, key.device)
            values = sight.call.run.kept(name, partial(indicators, some, starts, sight.pictures, key, heads))
            found.append(maths.mass_of_output(sight.attend(values, chunks), len(some), heads))
        return torch.cat(found, -1)


def indicators(words: tuple[tuple[int, ...], ...], starts: Starts, pictures: int, key: Tensor, heads: int) -> Tensor:
    """Indicator values (R, M, C) of some words' positions, counted from where their prompt begins in each prompt."""
    rows = [[[start + position for start in begins for position in word] for word in words] for begins in starts]
    values = [maths.indicator_values(row, key.shape[1], heads, key.shape[-1] // heads) for row in rows]
    return torch.stack(values).repeat_interleave(pictures, 0).to(key)


# ---- on a clone -----------------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[host.AttentionLayer], bool]] = {
    "all": lambda layer: True,
    "encoder": lambda layer: layer.block == "input",
    "middle": lambda layer: layer.block == "middle",
    "decoder": lambda layer: layer.block == "output",
}


@dataclass(frozen=True)
class RecordSettings(Settings):
    """Which layers are watched, and when; see PalimpsestAttentionMap."""

    layers: str = "all"
    start_percent: float = 0.0
    end_percent: float = 1.0


def chosen_layers(model: Any, layers: str) -> list[host.AttentionLayer]:
    """The layers of a choice; of a transformer the first, second and last third."""
    present = host.word_layers(model, TECHNIQUE)
    if host.is_unet(model):
        return [layer for layer in present if LAYERS[layers](layer)]
    third = [len(present) * part // 3 for part in range(4)]
    spans = {"encoder": (0, 1), "middle": (1, 2), "decoder": (2, 3)}
    first, last = spans.get(layers, (0, 3))
    return present[third[first] : third[last]]


def record_words(
    model: Any, words: ChosenWords, settings: RecordSettings, needs_samples: bool = True
) -> tuple[Any, AttentionRecord]:
    """A clone of the model that records where words act, and the record. Its pictures are the model's, bit for bit.

    Raises ValueError for models without such layers, and for an empty span of steps.
    """
    from comfy.patcher_extension import WrappersMP

    window = host.Window.of(model, settings.start_percent, settings.end_percent)
    chosen = chosen_layers(model, settings.layers)
    if not chosen:
        raise ValueError(
            f"this model has no layer that looks at the prompt in its {settings.layers}: set layers to all."
        )
    record, name = AttentionRecord(words.words, needs_samples), f"{NAME}.{uuid.uuid4().hex}"
    patched = model.clone()
    recorder = RecordWords(name, words, frozenset(layer.key for layer in chosen), window)
    attach(patched, chosen, recorders=(recorder,))
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, name, KeepRun(name, record))
    return patched, record
