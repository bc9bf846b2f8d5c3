"""Self-attention across frames inside the host: the pictures of a batch are the frames of one clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import video_attention as maths
from .. import host
from ..settings import Settings

TECHNIQUE = "Video Attention"

FRAMES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "first and previous": maths.first_and_previous,
    "own, first and previous": maths.own_first_and_previous,
    "own and first": maths.own_and_first,
    "first": maths.first,
    "previous": maths.previous,
    "middle": maths.middle,
    "all": maths.every,
}


@lru_cache(maxsize=64)
def sources(look_at: Callable[[int, int], tuple[int, ...]], frames: int, device: torch.device) -> Tensor:
    """(B, F) the frames that each of B frames looks at."""
    with torch.inference_mode(False):  # an index that was made in inference mode cannot stand in a gradient
        return torch.tensor([look_at(frame, frames - 1) for frame in range(frames)], device=device)


@lru_cache(maxsize=256)
def sources_in_window(
    look_at: Callable[[int, int], tuple[int, ...]], shown: tuple[int, ...], length: int, device: torch.device
) -> Tensor:
    """(B, F) the rows that each row looks at, where a call holds some frames of a clip, or of clips of `length` frames.

    In the clip's order the frames that are there are taken for the clip, whatever order the window has them in.
    Raises ValueError where rows would look at different numbers of frames.
    """
    clips: dict[int, list[int]] = {}
    for frame in sorted(set(shown)):
        clips.setdefault(frame // length if length else 0, []).append(frame)
    found = []
    for frame in shown:
        there = clips[frame // length if length else 0]
        looked_at = look_at(there.index(frame), len(there) - 1)
        found.append([shown.index(there[place]) for place in looked_at])
    if len({len(rows) for rows in found}) > 1:
        raise cut_clips(length)
    with torch.inference_mode(False):
        return torch.tensor(found, device=device)


def cut_clips(length: int) -> ValueError:
    """The error where the host's windows do not hold whole clips, and whole clips are needed."""
    return ValueError(
        f"the host's context windows cut the clips of {length} frames that clip_length names: give Context Windows a "
        f"context_length that is a multiple of {length}, context_overlap 0 and the schedule batched, set clip_length "
        "to 0, or take that node out."
    )


@dataclass(frozen=True)
class FrameAttention:
    """attn1 replacement: a frame's keys and values are those of other frames of its clip, with a share over time.

    Every prompt of a call has the whole batch in its rows: clips of `length` frames, or one (0). What acted here before
    is given the gathered keys and values. A single frame, and model calls outside of the window, are left alone. Where
    the host samples a clip in windows, the frames of one are the clip.
    """

    look_at: Callable[[int, int], tuple[int, ...]]
    layers: frozenset[host.LayerKey]
    window: host.Window
    strength: float = 1.0
    temporal: float = 0.0
    length: int = 0
    previous: Any = None

    @host.not_compiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        frames, shown = self.frames(key, options), host.frames_of(options).shown
        attend = partial(host.run_attention, options, self.previous, query)
        if frames == 1 or host.layer_key(options) not in self.layers or not host.acts(self.window, options):
            return attend(key, value)
        tiles = len(query) // len(key)  # more rows of queries than of keys: another node tiles them
        if shown is None:
            seen = sources(self.look_at, frames, key.device)
        else:
            seen = sources_in_window(self.look_at, shown, self.length, key.device)
        out = attend(*(maths.gathered(t, seen, tiles) for t in (key, value))) if self.strength else attend(key, value)
        if 0.0 < self.strength < 1.0:
            out = torch.lerp(attend(key, value), out, self.strength)
        if self.temporal:
            if shown is not None and not whole_clips(shown, self.length):
                raise cut_clips(self.length)
            out = torch.lerp(out, over_time(query, key, value, frames, options), self.temporal)
        return out

    def frames(self, key: Tensor, options: dict) -> int:
        """Frames of a clip that are in a call. Raises ValueError for a batch that holds no whole number of clips."""
        _, pictures = host.chunk_rows(options, len(key))
        frames = host.frames_of(options)
        batch = pictures if frames.shown is None else frames.clip
        if self.length and batch % self.length:
            raise ValueError(
                f"the batch has {batch} pictures, which is no whole number of clips of {self.length} frames: set "
                "clip_length to 0 where the batch is one clip, or to the frames of each."
            )
        return min(self.length or pictures, pictures)


def whole_clips(shown: tuple[int, ...], length: int) -> bool:
    """Whether frames are clips of `length` one after another, whole and in order; 0: whether they are one clip."""
    in_order = shown == tuple(range(shown[0], shown[0] + len(shown)))
    return not length or (in_order and shown[0] % length == len(shown) % length == 0)


def over_time(query: Tensor, key: Tensor, value: Tensor, frames: int, options: dict) -> Tensor:
    """Attention of every place over the frames, by the layer's own projections; (R, N, C) each.

    Raises ValueError where tokens are not one for each place.
    """
    if query.shape != key.shape:
        raise ValueError(
            f"attention over time cannot tell which place is which: a layer has {query.shape[1]} queries and "
            f"{key.shape[1]} keys because another node merges or tiles them (ToMe, HyperTile): set temporal to 0, or "
            "take it out."
        )
    places = (maths.by_place(t, frames) for t in (query, key, value))
    return maths.by_frame(host.run_attention(options, None, *places), query.shape[1])


@dataclass(frozen=True)
class VideoSettings(Settings):
    """Which frames look at which, where and when; see PalimpsestVideoAttention for what each does to the picture."""

    look_at: str = "own, first and previous"
    layers: str = "all"
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    temporal: float = 0.0
    clip_length: int = 0


def apply(model: Any, settings: VideoSettings) -> Any:
    """A clone of the model whose self-attention goes across frames. At both strengths 0 it is the model, bit for bit.

    Raises ValueError for models other than U-Nets and for an empty span of steps.
    """
    chosen = host.chosen_self_attention(model, settings.layers, TECHNIQUE)
    window = host.Window.of(model, settings.start_percent, settings.end_percent)
    patched = model.clone()
    if settings.strength == settings.temporal == 0.0:
        return patched
    host.observe(patched)
    patch = FrameAttention(
        look_at=FRAMES[settings.look_at],
        layers=frozenset(layer.key for layer in chosen),
        window=window,
        strength=settings.strength,
        temporal=settings.temporal,
        length=settings.clip_length,
    )
    longer = settings.strength > 0 and len(patch.look_at(0, 1)) > 1
    host.replace_attention(patched, "attn1", chosen, lambda earlier: replace(patch, previous=earlier), longer)
    return patched
