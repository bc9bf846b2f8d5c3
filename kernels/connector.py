"""The connector of MUMU: what a language model thought of a prompt becomes what a U-Net's cross-attention reads.

arXiv:2406.18790, section 3: "The Idefics2 hidden states are passed to a 16 layer non-causal transformer and then into
SDXL cross-attention." The paper gives no width; here a linear layer goes to the U-Net's context width first, so that 16
layers for SDXL have 0.8 billion weights instead of 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIMITS = {"hidden_width": 65536, "context_width": 16384, "depth": 128, "heads": 256, "mlp_ratio": 16}


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes of a connector. Raises ValueError for sizes that cannot be built.

    hidden_width: channels of the language model's hidden states (4096 for Idefics2). context_width: channels of a
    token in the U-Net's cross-attention (768 for SD 1.5, 2048 for SDXL), and of every block. pooled_width: channels of
    the learned vector for SDXL's pooled output (1280), or 0 for none.
    """

    hidden_width: int
    context_width: int
    depth: int = 16
    heads: int = 32
    mlp_ratio: int = 4
    pooled_width: int = 0

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"a connector's {name} must be from 1 to {limit}, it is {getattr(self, name)}.")
        if self.context_width % self.heads:
            raise ValueError(
                f"a connector's context_width must divide by its {self.heads} heads, it is {self.context_width}."
            )
        if not 0 <= self.pooled_width <= 16384:
            raise ValueError(f"a connector's pooled_width must be from 0 to 16384, it is {self.pooled_width}.")


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, token_mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V over the tokens that are there, every token to every other.

    query, key, value (B, L, C); token_mask (B, L), True for tokens, False for padding -> (B, L, C).
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    mask = None if token_mask is None else token_mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def mean_token(tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """The mean of the tokens that are there: (B, L, C), token_mask (B, L) -> (B, C)."""
    if token_mask is None:
        return tokens.mean(1)
    weight = token_mask.to(tokens)[..., None]
    return (tokens * weight).sum(1) / weight.sum(1)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)): a pre-norm transformer layer without a causal mask."""

    def __init__(self, config: ConnectorConfig, operations: Any, **where: Any):
        super().__init__()
        width, inner = config.context_width, config.context_width * config.mlp_ratio
        self.heads = config.heads
        self.norm_attention, self.norm_mlp = (operations.LayerNorm(width, **where) for _ in range(2))
        self.query, self.key, self.value, self.out = (operations.Linear(width, width, **where) for _ in range(4))
        self.widen, self.narrow = operations.Linear(width, inner, **where), operations.Linear(inner, width, **where)

    def forward(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        """(B, L, width), token_mask (B, L) -> (B, L, width)."""
        n = self.norm_attention(tokens)
        tokens = tokens + self.out(attend(self.query(n), self.key(n), self.value(n), self.heads, token_mask))
        return tokens + self.narrow(F.gelu(self.widen(self.norm_mlp(tokens))))


class ConnectorNetwork(nn.Module):
    """Linear to the context width, `depth` blocks, LayerNorm; a linear layer on the mean token where pooled.

    Layers come from `operations`: torch.nn, or a set with its names such as the host's.
    """

    def __init__(self, config: ConnectorConfig, operations: Any, dtype: Any = torch.float32, device: Any = None):
        super().__init__()
        self.config, where = config, {"dtype": dtype, "device": device}
        self.project = operations.Linear(config.hidden_width, config.context_width, **where)
        self.blocks = nn.ModuleList(Block(config, operations, **where) for _ in range(config.depth))
        self.norm_out = operations.LayerNorm(config.context_width, **where)
        self.pooled = None
        if config.pooled_width:
            self.pooled = operations.Linear(config.context_width, config.pooled_width, **where)

    def forward(self, hidden: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(context (B, L, context_width), pooled (B, pooled_width) or None) of hidden states (B, L, hidden_width).

        token_mask (B, L): True for tokens, False for padding, which no token looks at and which comes out as zeros.
        """
        tokens = self.project(hidden)
        for block in self.blocks:
            tokens = block(tokens, token_mask)
        tokens = self.norm_out(tokens)
        pooled = None if self.pooled is None else self.pooled(mean_token(tokens, token_mask))
        return tokens if token_mask is None else tokens * token_mask[..., None], pooled


def initialise(network: ConnectorNetwork, seed: int) -> None:
    """Untrained weights, the same for a seed on every device; what a block adds starts small.

    Weights are normal with variance 1 / inputs; those that end a block are smaller by sqrt(2 depth), so that the sum
    over the blocks keeps its size (GPT-2's rule). The pooled vector starts at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = (2 * network.config.depth) ** -0.5
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.startswith("pooled."):
                parameter.zero_()
            else:
                scale = residual if name.endswith((".out.weight", ".narrow.weight")) else 1.0
                drawn = torch.randn(parameter.shape, generator=generator) * scale / parameter.shape[1] ** 0.5
                parameter.copy_(drawn)


def weighted(context: Tensor, neutral: Tensor, weight: Tensor) -> Tensor:
    """c' = c0 + w (c - c0): the host's own rule for weighted words, for the tokens of weighted pictures.

    context c (B, L, C), neutral c0 (1 or B, 1, C): the empty prompt's token; weight w (L,). Tokens of weight 1 keep
    their bits.
    """
    moved = neutral + weight[:, None] * (context - neutral)
    return torch.where((weight == 1.0)[:, None], context, moved)


def repeated(tokens: Tensor, length: int) -> Tensor:
    """Tokens (B, L, C) over and over up to a length: (B, length, C).

    Whole repetitions leave attention to the tokens as it is, for softmax gives each copy its share; of a last one that
    is cut off, the tokens in it count once more than the others.
    """
    return tokens[:, torch.arange(length, device=tokens.device) % tokens.shape[1]]
