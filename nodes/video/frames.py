"""Which frames of a clip are in a model call, and which of its rows each of them looks at."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ...kernels import video_attention as maths
from .. import host

LookAt = Callable[[int, int], tuple[int, ...]]

FRAMES: dict[str, LookAt] = {
    "first and previous": maths.first_and_previous,
    "own, first and previous": maths.own_first_and_previous,
    "own and first": maths.own_and_first,
    "first": maths.first,
    "previous": maths.previous,
    "middle": maths.middle,
    "all": maths.every,
}


@lru_cache(maxsize=64)
def sources(look_at: LookAt, frames: int, device: torch.device) -> Tensor:
    """(B, F) the frames that each of B frames looks at."""
    with torch.inference_mode(False):  # an index that was made in inference mode cannot stand in a gradient
        return torch.tensor([look_at(frame, frames - 1) for frame in range(frames)], device=device)


@lru_cache(maxsize=256)
def sources_in_window(look_at: LookAt, shown: tuple[int, ...], length: int, device: torch.device) -> Tensor:
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


def clip_frames(pictures: int, frames: host.Frames, length: int) -> int:
    """Frames of a clip that are in a call of so many pictures a prompt; length: of a clip, 0 for one of all.

    Raises ValueError for a batch that holds no whole number of clips.
    """
    batch = pictures if frames.shown is None else frames.clip
    if length and batch % length:
        raise ValueError(
            f"the batch has {batch} pictures, which is no whole number of clips of {length} frames: set "
            "clip_length to 0 where the batch is one clip, or to the frames of each."
        )
    return min(length or pictures, pictures)


def rows_seen(look_at: LookAt, count: int, frames: host.Frames, length: int, device: torch.device) -> Tensor:
    """(B, F) the rows that each row of a clip looks at, or of all that a window of the host's shows.

    count: clip_frames of the call.
    """
    if frames.shown is None:
        return sources(look_at, count, device)
    return sources_in_window(look_at, frames.shown, length, device)


def whole_clips(shown: tuple[int, ...], length: int) -> bool:
    """Whether frames are clips of `length` one after another, whole and in order; 0: whether they are one clip."""
    in_order = shown == tuple(range(shown[0], shown[0] + len(shown)))
    return not length or (in_order and shown[0] % length == len(shown) % length == 0)
