"""Self-attention across the frames of a clip, sparse-causal and over time (Tune-A-Video, arXiv:2212.11565, 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# ---- which frames frame i of a clip looks at; `last` is the clip's last frame ----------------------------------------


def first_and_previous(frame: int, last: int) -> tuple[int, ...]:
    """Tune-A-Video: K = W^K [z_1; z_(i-1)], V = W^V [z_1; z_(i-1)]; the first frame, having no other, sees itself."""
    return 0, max(frame - 1, 0)


def own_first_and_previous(frame: int, last: int) -> tuple[int, ...]:
    """The frame itself as well, which Tune-A-Video leaves out and an untrained model is used to."""
    return frame, 0, max(frame - 1, 0)


def own_and_first(frame: int, last: int) -> tuple[int, ...]:
    """The frame itself and the first."""
    return frame, 0


def first(frame: int, last: int) -> tuple[int, ...]:
    """The first frame alone (Text2Video-Zero, arXiv:2303.13439)."""
    return (0,)


def previous(frame: int, last: int) -> tuple[int, ...]:
    """The frame before alone."""
    return (max(frame - 1, 0),)


def middle(frame: int, last: int) -> tuple[int, ...]:
    """The middle frame alone: what FateZero's own settings use."""
    return (last // 2,)


def every(frame: int, last: int) -> tuple[int, ...]:
    """All frames, this one included: the whole clip as one picture."""
    return tuple(range(last + 1))


# ---- the equations ---------------------------------------------------------------------------------------------------


def gathered(tokens: Tensor, sources: Tensor, tiles: int = 1) -> Tensor:
    """For each frame the tokens of the frames it looks at, one after another: [z_s1; z_s2; ...].

    tokens (G * B, N, C): G clips of B frames that are computed together (a prompt each). sources (B, F): frames of the
    same clip, each counting as often as it is named. Returns (G * B, F * N, C). tiles: every frame's tokens are in so
    many groups of N / tiles that look at their like only; then (G * B * tiles, F * N / tiles, C).
    """
    frames, (rows, _, channels) = len(sources), tokens.shape
    parts = tokens.reshape(rows // frames, frames, tiles, -1, channels)[:, sources]
    return parts.transpose(2, 3).reshape(rows * tiles, -1, channels)


def by_place(tokens: Tensor, frames: int) -> Tensor:
    """The tokens of one place, frame after frame: attention among them is attention over time.

    Tune-A-Video: Attention(z_(i,n), z_(.,n)). tokens (G * B, N, C): G clips of B frames -> (G * N, B, C).
    """
    return tokens.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)


def by_frame(tokens: Tensor, places: int) -> Tensor:
    """by_place undone: (G * N, B, C) -> (G * B, N, C)."""
    return tokens.unflatten(0, (-1, places)).transpose(1, 2).flatten(0, 1)


# ---- where text and picture are one sequence -------------------------------------------------------------------------


def beside_text(tokens: Tensor, image: slice, sources: Tensor) -> Tensor:
    """A row's tokens with the picture's tokens of the frames it looks at: [text; z_s1; rest; z_s2; ...].

    tokens (G * B, H, M, D): G clips of B frames; image: where the N tokens of a picture are among the M. Text, and what
    else there is, stay the row's own. sources (B, F) as for `gathered`. Returns (G * B, H, M + (F - 1) * N, D).
    """
    picture = tokens[:, :, image].unflatten(0, (-1, len(sources)))
    first, *others = (picture[:, rows].flatten(0, 1) for rows in sources.unbind(1))
    return torch.cat([tokens[:, :, : image.start], first, tokens[:, :, image.stop :], *others], 2)


def share_kept(bias: Tensor, image: slice, frames: int) -> Tensor:
    """What is added to the scores of the keys of `beside_text`, so that text keeps its share of the attention.

    out = (sum_text e^s v + 1/F sum_f sum_n e^s_fn v_fn) / (sum_text e^s + 1/F sum_f sum_n e^s_fn), as s + log(1/F) for
    the picture's keys; F equal frames give what one gives. Without it their share would grow with F.

    bias (..., M): what is added for one frame, which holds for each. Returns (..., M + (F - 1) * N).
    """
    picture = bias[..., image] - math.log(frames)
    own = bias[..., : image.start], picture, bias[..., image.stop :]
    return torch.cat([*own, *[picture] * (frames - 1)], -1)
