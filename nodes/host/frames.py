"""The frames of a clip that a model call holds: the host can sample a clip in windows of some frames each.

Its Context Windows nodes cut batch, masks and prompts for each window before it calls the model, so that the rows of a
call are some frames of the clip, and not always its first. What is known of every frame is looked up here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

HANDLER, WINDOW = "context_handler", "context_window"  # the host's keys in model_options and transformer_options


@dataclass(frozen=True)
class Frames:
    """What the rows of each prompt are in one model call: all of the batch, in order, or some frames of a clip.

    shown: the frame in every row, None for all. clip: how many frames the clip has, where they are not all shown.
    """

    shown: tuple[int, ...] | None = None
    clip: int = 0

    def rows(self, of_frames: Tensor) -> Tensor:
        """Of what is known of every frame (clip, ...), or of all alike (1, ...), the part for this call's rows."""
        if self.shown is None or len(of_frames) == 1:
            return of_frames
        return of_frames[indices(self.shown, of_frames.device)]


EVERY = Frames()


@lru_cache(maxsize=256)
def indices(shown: tuple[int, ...], device: torch.device) -> Tensor:
    """Frames as an index on a device."""
    with torch.inference_mode(False):  # an index that was made in inference mode cannot stand in a gradient
        return torch.tensor(shown, device=device)


def shown_frames(model_options: dict, x: Tensor) -> Frames:
    """The frames in the latent (B, C, H, W) of a model call, from what the host tells of its window.

    Raises ValueError where windows cut the picture instead of the clip.
    """
    handler = model_options.get(HANDLER)
    window = model_options.get("transformer_options", {}).get(WINDOW)
    if handler is None or window is None:
        return EVERY
    if window.dim == 2 and x.ndim == 5:
        raise ValueError(
            "the host's context windows cut the frames of this video apart, which is not served yet: take Context "
            "Windows out, or sample a shorter video."
        )
    if window.dim != 0:
        raise ValueError(
            f"the host's context windows cut along dimension {window.dim}, which is no frame of a clip but a part of "
            "the picture: set dim to 0 in Context Windows, where the frames of a batch are, or take that node out."
        )
    before = getattr(window, "causal_anchor_index", None)  # a frame in front whose result the host throws away
    shown = [*([] if before is None or before < 0 else [before]), *window.index_list]
    for frame in getattr(handler, "latent_retain_index_list", ()):  # the host puts frame n in the n-th place
        shown[frame] = frame % window.total_frames
    if len(shown) != len(x):  # the options still name the window of an earlier call
        return EVERY
    return Frames(tuple(shown), window.total_frames)


class WholeClip:
    """Stands for the host's window handler where all frames are to be seen at once."""

    dim, context_length, freenoise = 0, 2**31, False

    def should_use_context(self, *_: Any, **__: Any) -> bool:
        """Never in windows."""
        return False


@dataclass(frozen=True)
class Rows:
    """Stands for the host's window where a call of our own shows some pictures of a batch."""

    index_list: tuple[int, ...]
    total_frames: int
    dim: int = 0


def showing(model_options: dict, rows: tuple[int, ...], pictures: int) -> dict:
    """Options of a call that shows these of all pictures; `pick_rows` gives it their prompts."""
    options = model_options.get("transformer_options", {}) | {WINDOW: Rows(rows, pictures)}
    return model_options | {HANDLER: WholeClip(), "transformer_options": options}


def pick_rows(
    executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict, **kwargs: Any
) -> Any:
    """CALC_COND_BATCH wrapper: of prompts with a row for each picture, those of the pictures that a call shows."""
    frames = shown_frames(model_options, x)

    def pick(value: Any) -> Any:
        tensor = getattr(value, "cond", None)
        several = isinstance(tensor, Tensor) and len(tensor) == frames.clip > 1
        return type(value)(frames.rows(tensor)) if several else value

    def picked(cond: dict) -> dict:
        return cond | {"model_conds": {name: pick(value) for name, value in cond["model_conds"].items()}}

    if frames.shown is not None:
        conds = [None if group is None else [picked(cond) for cond in group] for group in conds]
    return executor(model, conds, x, timestep, model_options, **kwargs)


def in_one_window(model_options: dict) -> dict:
    """Options under which the host samples a clip as a whole."""
    return model_options | {HANDLER: WholeClip()} if HANDLER in model_options else model_options


def windows_part_prompts(model_options: dict, frames: int) -> bool:
    """Whether windows of a clip are sampled with one each of several prompts, instead of with all of them."""
    handler = model_options.get(HANDLER)
    return getattr(handler, "split_conds_to_windows", False) and frames > handler.context_length
