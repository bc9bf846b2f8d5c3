"""The layers that the networks of context adapters are made of: attention, residual blocks, positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import AdapterConfig

FINEST_ANGLE = 64.0  # the fastest wave of a position, in half turns over the picture
FRAMES_AT_FINEST = 64.0  # frames over which a frame's position runs from 0 to 1


def waves(values: Tensor, width: int) -> Tensor:
    """Numbers in 0..1 as sines and cosines of `width` / 2 speeds, from half a turn to 64: (...) -> (..., width)."""
    speeds = torch.logspace(0, 1, width // 2, base=FINEST_ANGLE, device=values.device, dtype=values.dtype) * torch.pi
    turns = values[..., None] * speeds
    return torch.cat([turns.sin(), turns.cos()], -1)


def positions(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """Where each patch lies in the picture, (rows * columns, width): independent of the picture's size."""
    y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (rows, columns))
    grid = waves(y, width // 2)[:, None].expand(-1, columns, -1), waves(x, width // 2)[None].expand(rows, -1, -1)
    return torch.cat(grid, -1).flatten(0, 1)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V by the host's PyTorch attention, which has a gradient whatever attention is chosen."""
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(query, key, value, heads, mask=mask)


class Attention(nn.Module):
    """Multi-head attention from tokens (B, N, width) to a context (B, M, width)."""

    def __init__(self, width: int, heads: int, operations: Any, **where: Any):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (operations.Linear(width, width, **where) for _ in range(4))

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, width), (B, M, width), mask (N, M) True where a token may look -> (B, N, width)."""
        found = attend(self.query(tokens), self.key(context), self.value(context), self.heads, mask)
        return self.out(found)


class Block(nn.Module):
    """Attention to the prompt and an MLP, both pre-norm and residual, their inputs scaled and shifted by the level.

    Video: before them, attention within each frame, and from each patch to itself in this and earlier frames.
    """

    def __init__(self, config: AdapterConfig, operations: Any, **where: Any):
        super().__init__()
        width = config.width

        def norm() -> nn.Module:
            return operations.LayerNorm(width, **where)

        self.norm_cross, self.norm_mlp = norm(), norm()
        self.cross = Attention(width, config.heads, operations, **where)
        self.widen, self.narrow = (
            operations.Linear(a, b, **where) for a, b in ((width, 2 * width), (2 * width, width))
        )
        self.film = operations.Linear(width, 4 * width, **where) if config.timestep else None
        self.norm_spatial, self.norm_temporal = (norm() if config.video else None for _ in range(2))
        self.spatial, self.temporal = (
            Attention(width, config.heads, operations, **where) if config.video else None for _ in range(2)
        )

    def forward(self, tokens: Tensor, text: Tensor, level: Tensor | None, frames: int) -> Tensor:
        """tokens (B, N, width), text (B, L, width), level (B, width), B = clips * frames -> (B, N, width)."""
        if self.spatial is not None:
            within = self.norm_spatial(tokens)
            tokens = tokens + self.spatial(within, within)
            tokens = tokens + self.through_time(self.norm_temporal(tokens), frames)
        shift_cross, scale_cross, shift_mlp, scale_mlp = self.modulation(level)
        asking = self.norm_cross(tokens) * (1.0 + scale_cross) + shift_cross
        tokens = tokens + self.cross(asking, text)
        inner = self.norm_mlp(tokens) * (1.0 + scale_mlp) + shift_mlp
        return tokens + self.narrow(F.gelu(self.widen(inner)))

    def modulation(self, level: Tensor | None) -> tuple[Tensor | float, ...]:
        """Shift and scale of the two inputs, (B, 1, width) each (FiLM, arXiv:1709.07871); zeros without a level."""
        return (0.0,) * 4 if self.film is None else self.film(level)[:, None].chunk(4, -1)

    def through_time(self, tokens: Tensor, frames: int) -> Tensor:
        """Temporal causal attention: frame f of a clip looks at frames 0..f, each patch at its own place."""
        count, width = tokens.shape[1:]
        clips = tokens.unflatten(0, (-1, frames)).movedim(1, 2).flatten(0, 1)  # (clips * N, frames, width)
        when = waves(torch.arange(frames, device=clips.device, dtype=clips.dtype) / FRAMES_AT_FINEST, width)
        before = torch.ones(frames, frames, device=clips.device, dtype=torch.bool).tril()
        found = self.temporal(clips + when, clips + when, before)
        return found.unflatten(0, (-1, count)).movedim(1, 2).flatten(0, 1)


def level_layers(config: AdapterConfig, operations: Any, **where: Any) -> nn.Sequential | None:
    """What makes a noise level's angle into what blocks are shifted by; None for adapters that are not told it."""
    if not config.timestep:
        return None
    first, second = (operations.Linear(config.width, config.width, **where) for _ in range(2))
    return nn.Sequential(first, nn.SiLU(), second)


def told_level(layers: nn.Sequential | None, angle: Tensor, tokens: Tensor) -> Tensor | None:
    """The level (B, width) of angles (B,) for tokens (B, N, width)."""
    return None if layers is None else F.silu(layers(waves(angle.to(tokens), tokens.shape[-1])))


def latent_of(patches: Tensor, rows: int, patch: int) -> Tensor:
    """Patches (B, rows * columns, C * patch^2) put together: (B, C, rows * patch, columns * patch)."""
    return F.pixel_shuffle(patches.mT.unflatten(2, (rows, -1)), patch)
