"""r_phi of ContextDiff: a small network over a picture's latent and its prompt that says where the path should shift.

Queries are patches of the latent, keys and values are the prompt's tokens; the output has the latent's shape and starts
at exactly zero. The video form adds attention within a frame and to the frames before. The paper reads picture and
text through CLIP; here the picture is the latent itself, so that r_phi(x0_hat, c, t) costs no VAE pass in sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training import generator

SIZES = {"small": (256, 2), "medium": (384, 3), "large": (512, 4)}  # width, depth; large is nearest to the paper's CLIP
FINEST_ANGLE = 64.0  # the fastest wave of a position, in half turns over the picture
FRAMES_AT_FINEST = 64.0  # frames over which a frame's position runs from 0 to 1
LIMITS = {"latent_channels": 256, "text_width": 16384, "width": 4096, "depth": 64, "heads": 64, "patch": 32}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is built for and how large it is. Raises ValueError for sizes that cannot be built.

    latent_format: the host's name of the latent space ("SD15", "SDXL", ...). text_width: channels of a prompt's token
    (768 for SD 1.5, 2048 for SDXL). patch: latent pixels along a token's side. video: a batch is the frames of one
    clip. timestep: r depends on the noise level; without, one evaluation serves both levels of a step.
    """

    latent_format: str
    latent_channels: int
    text_width: int
    width: int = 256
    depth: int = 2
    heads: int = 8
    patch: int = 2
    video: bool = False
    timestep: bool = True

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"a context adapter's {name} must be from 1 to {limit}, it is {getattr(self, name)}.")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"a context adapter's width must divide by 4 and by its {self.heads} heads, it is {self.width}."
            )

    @classmethod
    def for_model(cls, model: Any, text_width: int, size: str = "small", **changes: Any) -> AdapterConfig:
        """The config that fits a host MODEL and prompts of this width: a size of SIZES, patches that keep SDXL cheap.

        A latent of 64 x 64 (SD 1.5, 512 px) and one of 128 x 128 (SDXL, 1024 px) both become 1024 tokens.
        """
        latent_format = model.get_model_object("latent_format")
        width, depth = SIZES[size]
        settings = {"width": width, "depth": depth, "patch": 4 if text_width > 1024 else 2} | changes
        return cls(type(latent_format).__name__, latent_format.latent_channels, text_width, **settings)

    def refuse_text(self, width: int) -> None:
        """Raise ValueError for prompts of another width."""
        if width != self.text_width:
            raise ValueError(
                f"the context adapter was trained with prompts of {self.text_width} channels, this prompt has {width}: "
                "connect the CLIP of the model family it was trained with."
            )


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


class ContextNetwork(nn.Module):
    """r_phi(x_0, c, t): see the module. Layers come from `operations`, a set of the host's comfy.ops."""

    def __init__(self, config: AdapterConfig, operations: Any, dtype: Any = torch.float32, device: Any = None):
        super().__init__()
        self.config = config
        width, where = config.width, {"dtype": dtype, "device": device}
        numbers = config.latent_channels * config.patch**2
        self.patches = operations.Linear(numbers, width, **where)
        self.norm_text = operations.LayerNorm(config.text_width, **where)
        self.text = operations.Linear(config.text_width, width, **where)
        self.level = None
        if config.timestep:
            first, second = (operations.Linear(width, width, **where) for _ in range(2))
            self.level = nn.Sequential(first, nn.SiLU(), second)
        self.blocks = nn.ModuleList(Block(config, operations, **where) for _ in range(config.depth))
        self.norm_out = operations.LayerNorm(width, **where)
        self.out = operations.Linear(width, numbers, **where)

    def forward(self, clean: Tensor, text: Tensor, angle: Tensor, frames: int = 1) -> Tensor:
        """r for latents, prompts and noise levels.

        clean x_0 (B, C, H, W) in the model's own latent scale, text (B, L, text_width), angle (B,) from `noise_angle`;
        B = clips * frames for a video adapter. Returns (B, C, H, W) in clean's dtype. Any H, W: the last patches are
        filled up by repeating the border.
        """
        height, width = clean.shape[-2:]
        patch = self.config.patch
        filled = F.pad(clean, (0, -width % patch, 0, -height % patch), mode="replicate")
        cut = F.pixel_unshuffle(filled, patch)
        rows, columns = cut.shape[-2:]
        tokens = self.patches(cut.flatten(2).mT)
        tokens = tokens + positions(rows, columns, tokens.shape[-1], tokens)
        text = self.text(self.norm_text(text))
        level = None if self.level is None else F.silu(self.level(waves(angle.to(tokens), tokens.shape[-1])))
        for block in self.blocks:
            tokens = block(tokens, text, level, frames)
        put = self.out(self.norm_out(tokens)).mT.unflatten(2, (rows, columns))
        return F.pixel_shuffle(put, patch)[..., :height, :width]


def closed(name: str) -> bool:
    """Whether a layer starts at zero, so that what it belongs to changes nothing until it is trained."""
    return name == "out" or name.endswith((".spatial.out", ".temporal.out", ".film"))


def initialise(network: ContextNetwork, seed: int) -> None:
    """Untrained weights: the output is exactly zero, and the video form equals the image form.

    The host's layers are allocated empty. The same seed gives the same weights on every device.
    """
    drawn = generator(seed)
    with torch.no_grad():
        for name, module in network.named_modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is None:
                continue
            if weight.ndim == 1:
                weight.fill_(1.0)
            elif closed(name):
                weight.zero_()
            else:
                weight.copy_(torch.randn(weight.shape, generator=drawn) / weight.shape[1] ** 0.5)
            if bias is not None:
                bias.zero_()


def build(config: AdapterConfig, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> ContextNetwork:
    """An r_phi with empty weights, of layers that the host casts and moves as it does its own."""
    import comfy.ops

    return ContextNetwork(config, comfy.ops.manual_cast, dtype, device)
