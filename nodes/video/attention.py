"""Self-attention across frames inside the host: the pictures of a batch are the frames of one clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import video_attention as maths
from .. import host
from ..settings import Settings
from .frames import FRAMES, clip_frames, cut_clips, rows_seen, whole_clips
from .joint import apply_joint, family_for_clips

TECHNIQUE = "Video Attention"


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
        (_, pictures), of_call = host.chunk_rows(options, len(key)), host.frames_of(options)
        frames = clip_frames(pictures, of_call, self.length)
        attend = partial(host.run_attention, options, self.previous, query)
        if frames == 1 or host.layer_key(options) not in self.layers or not host.acts(self.window, options):
            return attend(key, value)
        tiles = len(query) // len(key)  # more rows of queries than of keys: another node tiles them
        seen = rows_seen(self.look_at, frames, of_call, self.length, key.device)
        out = attend(*(maths.gathered(t, seen, tiles) for t in (key, value))) if self.strength else attend(key, value)
        if 0.0 < self.strength < 1.0:
            out = torch.lerp(attend(key, value), out, self.strength)
        if self.temporal:
            if of_call.shown is not None and not whole_clips(of_call.shown, self.length):
                raise cut_clips(self.length)
            out = torch.lerp(out, over_time(query, key, value, frames, options), self.temporal)
        return out


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
    """A clone of the model whose attention goes across frames. At both strengths 0 it is the model, bit for bit.

    Raises ValueError for models that know video, for those that are not known, and for an empty span of steps.
    """
    family = family_for_clips(model, TECHNIQUE)
    if family is not None:
        return apply_joint(model, family, settings)
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
