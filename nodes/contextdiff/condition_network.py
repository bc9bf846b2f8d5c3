"""What stands in the text encoder's place for classes and layouts (section 4.3): residual blocks that make tokens.

"We replace the text encoder in original adapter with ResNet blocks for embedding classes or layouts, and keep the
original image encoder and cross-attention module." The paper says no more. Ours, for a map m of shares:

    h_0 = conv(m),   h_i = f_i(half(h_{i-1})),   f(h) = h + conv(silu(norm(conv(silu(norm(h))))))
    tokens = W LN(h_3) + p                      p: the waves of a cell's place; a class has one cell, and no place
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .config import CLASS, AdapterConfig
from .layers import positions

BLOCKS = 3


class ResidualBlock(nn.Module):
    """Two convolutions after norm and SiLU, added to what came in."""

    def __init__(self, channels: int, kernel: int, operations: Any, **where: Any):
        super().__init__()
        groups = max([n for n in (2, 4, 8, 16, 32) if channels % (4 * n) == 0], default=1)  # of 4 channels at least
        around = kernel // 2
        self.norm1, self.norm2 = (operations.GroupNorm(groups, channels, **where) for _ in range(2))
        self.conv1, self.conv2 = (
            operations.Conv2d(channels, channels, kernel, padding=around, **where) for _ in range(2)
        )

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, rows, columns) -> the same shape."""
        return h + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(h))))))


class ConditionEncoder(nn.Module):
    """Tokens of a class or a layout."""

    def __init__(self, config: AdapterConfig, operations: Any, **where: Any):
        super().__init__()
        inner, kernel = config.width // 2, 1 if config.reads == CLASS else 3
        self.stem = operations.Conv2d(config.labels, inner, kernel, padding=kernel // 2, **where)
        self.residual = nn.ModuleList(ResidualBlock(inner, kernel, operations, **where) for _ in range(BLOCKS))
        self.norm = operations.LayerNorm(inner, **where)
        self.widen = operations.Linear(inner, config.width, **where)

    def forward(self, context: Tensor) -> Tensor:
        """A map (B, labels, rows, columns) -> (B, L, width); L is 1 for a class, a 16th of the cells for a layout."""
        h = self.stem(context)
        for number, block in enumerate(self.residual):
            h = block(F.avg_pool2d(h, 2) if number and h.shape[-1] > 1 else h)
        rows, columns = h.shape[-2:]
        tokens = self.widen(self.norm(h.flatten(2).mT))
        return tokens + positions(rows, columns, tokens.shape[-1], tokens) if rows * columns > 1 else tokens


def text_layers(config: AdapterConfig, operations: Any, **where: Any) -> dict[str, nn.Module]:
    """The layers of a network that read what it is told, by name."""
    if not config.reads_text:
        return {"condition": ConditionEncoder(config, operations, **where)}
    return {
        "norm_text": operations.LayerNorm(config.text_width, **where),
        "text": operations.Linear(config.text_width, config.width, **where),
    }


def words_of(network: Any, told: Tensor) -> Tensor:
    """What a network is told as tokens (B, L, width): a prompt's (B, L, text_width), or those of a class or layout."""
    return network.text(network.norm_text(told)) if network.config.reads_text else network.condition(told)
