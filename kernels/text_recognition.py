"""A reader of one line of text: the recogniser of PP-OCRv3 (arXiv:2206.03001), in plain PyTorch.

A small MobileNetV1 halves the height of a 48 pixel line five times and its width three times; two transformer blocks
mix the columns (SVTR, arXiv:2205.00159); a linear layer scores every character of its alphabet for every column, and
CTC (Graves et al., 2006) makes a text of them. Its 64 numbers a column are also what AnyText (arXiv:2311.03054,
section 3.3) knows of a line's look. Gradients reach the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEIGHT, WIDTH = 48, 320  # of a prepared line; wider lines are read as well, 320 wide ones are what embeddings are of
CHANNELS, CLASSES = 64, 6625  # of a column; of the alphabet: index 0 is CTC's blank
UPRIGHT = 1.2  # a line this much higher than wide is read turned by a quarter
# Inputs, outputs, kernel, stride and whether channels are weighed, of the thirteen separable convolutions.
BLOCKS = (
    (16, 32, 3, 1, False),
    (32, 64, 3, 1, False),
    (64, 64, 3, 1, False),
    (64, 128, 3, (2, 1), False),
    (128, 128, 3, 1, False),
    (128, 256, 3, (2, 1), False),
    *[(256, 256, 5, 1, False)] * 5,
    (256, 512, 5, (2, 1), True),
    (512, 512, 5, (1, 2), True),
)


class NormalisedConvolution(nn.Module):
    """act(BatchNorm(conv(x))), the convolution without a bias."""

    def __init__(self, operations: Any, *sizes: int, stride: Any = 1, groups: int = 1, act: Any = F.silu):
        super().__init__()
        inputs, outputs, kernel = sizes
        more = {"stride": stride, "padding": kernel // 2, "groups": groups}
        self.conv = operations.Conv2d(inputs, outputs, kernel, bias=False, **more)
        self.norm, self.act = nn.BatchNorm2d(outputs), act

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return self.act(self.norm(self.conv(x)))


class ChannelWeights(nn.Module):
    """x * hardsigmoid(W2 relu(W1 mean(x))): squeeze and excitation (arXiv:1709.01507)."""

    def __init__(self, operations: Any, channels: int):
        super().__init__()
        self.squeeze = operations.Conv2d(channels, channels // 4, 1)
        self.excite = operations.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class SeparableConvolution(nn.Module):
    """A convolution of each channel, perhaps their weights, and a mix of channels."""

    def __init__(self, operations: Any, inputs: int, outputs: int, *, kernel: int, stride: Any, weighs: bool):
        super().__init__()
        more = {"stride": stride, "groups": inputs, "act": F.hardswish}
        self.depth = NormalisedConvolution(operations, inputs, inputs, kernel, **more)
        self.weights = ChannelWeights(operations, inputs) if weighs else nn.Identity()
        self.mix = NormalisedConvolution(operations, inputs, outputs, 1, act=F.hardswish)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return self.mix(self.weights(self.depth(x)))


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)), of every column to every other."""

    def __init__(self, operations: Any, width: int = 120, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = operations.LayerNorm(width), operations.LayerNorm(width)
        self.qkv, self.out = operations.Linear(width, 3 * width), operations.Linear(width, width)
        self.widen, self.narrow = operations.Linear(width, 2 * width), operations.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> the same shape."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(F.silu(self.widen(self.norm_mlp(x))))


class Recogniser(nn.Module):
    """PP-OCRv3's recogniser: 2.64 million weights. It stands in evaluation mode; nothing here trains it.

    Layers come from `operations`: torch.nn, or a set with its names such as the host's.
    """

    def __init__(self, operations: Any = nn, classes: int = CLASSES):
        super().__init__()
        self.stem = NormalisedConvolution(operations, 3, 16, 3, stride=2, act=F.hardswish)
        self.blocks = nn.Sequential(
            *(
                SeparableConvolution(operations, inputs, outputs, kernel=kernel, stride=stride, weighs=weighs)
                for inputs, outputs, kernel, stride, weighs in BLOCKS
            )
        )
        self.narrow = NormalisedConvolution(operations, 512, 64, 3)
        self.to_columns = NormalisedConvolution(operations, 64, 120, 1)
        self.columns = nn.Sequential(Block(operations), Block(operations))
        self.norm = operations.LayerNorm(120, eps=1e-6)
        self.from_columns = NormalisedConvolution(operations, 120, 512, 1)
        self.join = NormalisedConvolution(operations, 1024, CHANNELS, 3)
        self.last = NormalisedConvolution(operations, CHANNELS, CHANNELS, 1)
        self.head = operations.Linear(CHANNELS, classes)
        self.eval()

    def features(self, pictures: Tensor) -> Tensor:
        """What it knows of each column, the "neck": prepared lines (L, 3, 48, W) -> (L, W / 8, 64)."""
        if pictures.ndim != 4 or pictures.shape[1:3] != (3, HEIGHT):
            raise ValueError(f"features: need prepared lines (L, 3, {HEIGHT}, W), got {tuple(pictures.shape)}")
        seen = F.avg_pool2d(self.blocks(self.stem(pictures)), 2)  # (L, 512, 1, W / 8)
        columns = self.to_columns(self.narrow(seen)).squeeze(2).transpose(1, 2)  # (L, W / 8, 120)
        columns = self.norm(self.columns(columns)).transpose(1, 2)[:, :, None]
        return self.last(self.join(torch.cat([seen, self.from_columns(columns)], 1))).squeeze(2).transpose(1, 2)

    def logits(self, features: Tensor) -> Tensor:
        """Scores of every character: (L, N, 64) -> (L, N, classes)."""
        return self.head(features)

    def forward(self, pictures: Tensor) -> Tensor:
        """(L, 3, 48, W) -> (L, W / 8, classes)."""
        return self.logits(self.features(pictures))


def prepared(line: Tensor, *, most: int | None = WIDTH) -> Tensor:
    """One line of text as the recogniser takes it, by AnyText's rule: (C, H, W) of 0..1 -> (3, 48, W').

    A line higher than 1.2 times its width is turned counterclockwise. It gets 48 pixels of height in its proportions
    (bilinear, corners on corners), at most `most` of width, the values 2 x - 1, and zeros up to 320 pixels or to the
    next multiple of 8. most=None: a long line keeps its proportions. C is 1 or 3.
    """
    if line.ndim != 3 or line.shape[0] not in (1, 3) or 0 in line.shape:
        raise ValueError(f"prepared: need a line (1 or 3, H, W), got {tuple(line.shape)}")
    if line.shape[1] > UPRIGHT * line.shape[2]:
        line = torch.rot90(line, 1, (1, 2))
    height, width = line.shape[1:]
    wide = math.ceil(HEIGHT * width / height)
    wide = wide if most is None else min(wide, most)
    scaled = F.interpolate(line[None].float(), (HEIGHT, wide), mode="bilinear", align_corners=True)[0]
    full = max(WIDTH, math.ceil(wide / 8) * 8)
    return F.pad(2.0 * scaled.expand(3, -1, -1) - 1.0, (0, full - wide))


@dataclass(frozen=True)
class Reading:
    """What was read in a line: its text, and the mean probability of its characters (0 for an empty text)."""

    text: str
    confidence: float


def best_path(logits: Tensor, characters: tuple[str, ...]) -> Reading:
    """The text of one line's scores (N, classes): the best of each column, repetitions once, blanks left out.

    CTC's best path (Graves et al., ICML 2006, eq. 4); the confidence is the mean over the columns that give a letter,
    PaddleOCR's. characters: by index, "" for the blank.
    """
    if logits.ndim != 2 or logits.shape[1] != len(characters):
        raise ValueError(f"best_path: need (N, {len(characters)}) scores, got {tuple(logits.shape)}")
    chances, best = logits.float().softmax(-1).max(-1)
    starts = torch.cat([best.new_ones(1, dtype=torch.bool), best[1:] != best[:-1]])
    gives = starts & (best != 0)
    text = "".join(characters[index] for index in best[gives].tolist())
    return Reading(text.strip(), float(chances[gives].mean()) if gives.any() else 0.0)
