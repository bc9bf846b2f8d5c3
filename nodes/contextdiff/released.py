"""r of the authors' released program, whose layer norm over the whole latent gives it a size of 1 from the start.

There, frames ask the prompt in four attention layers without residual: h <- W_o softmax(q(h) k(t)^T) v(t) + b_o,
where t, the prompt's embedding, is repeated once a frame. All keys are then the same, so that the softmax weighs them
alike, whatever the query, and W_o v(t) + b comes out: nothing of the picture, and of four layers the last alone. That
layer, the only one of the four that has a gradient, is all that is kept here:

    r = LN(W (W_o (W_v LN(t) + b_v) + b_o) + b)                    LN over all C x rows x columns numbers of a latent

Departures: t is the mean of the prompt's tokens in place of the pooled embeddings of three CLIPs (1536 numbers); for a
latent of another size than the trained one r is resampled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import AdapterConfig


class ReleasedNetwork(nn.Module):
    """r(c): the same for every picture and level. It does not start at zero."""

    def __init__(self, config: AdapterConfig, operations: Any, dtype: Any = torch.float32, device: Any = None):
        super().__init__()
        self.config = config
        width, where = config.width, {"dtype": dtype, "device": device}
        numbers = config.latent_channels * config.rows * config.columns
        self.norm_text = operations.LayerNorm(config.text_width, **where)
        self.value = operations.Linear(config.text_width, width, **where)
        self.mix = operations.Linear(width, width, **where)
        self.expand = operations.Linear(width, numbers, **where)
        self.norm_whole = operations.LayerNorm(numbers, **where)

    def forward(
        self, clean: Tensor, text: Tensor, angle: Tensor, frames: int = 1, picture: Tensor | None = None
    ) -> Tensor:
        """clean (B, C, H, W) gives r its shape alone; text (B, L, text_width). Returns (B, C, H, W)."""
        asked = self.mix(self.value(self.norm_text(text.mean(1))))
        size = self.config.latent_channels, self.config.rows, self.config.columns
        r = self.norm_whole(self.expand(asked)).unflatten(1, size)
        if r.shape[-2:] != clean.shape[-2:]:
            r = F.interpolate(r, clean.shape[-2:], mode="bilinear")
        return r
