"""r_phi as the paper prints it: CLIP's image tokens ask the prompt's tokens, and the answer is read out as a latent.

Section 3.1 and 4.1: "clip encoders to extract the embeddings of each pair", "multi-head cross attention with 8 parallel
attention layers", an output "with the same dimension as x_0"; for a clip "spatial self-attention and temporal causal
attention". What the paper leaves open is ours: residual blocks with an MLP, the level t by FiLM, and the reading out.

    h_0 = W_I LN(e_I(x)),   h_l = Block_l(h_{l-1}, W_T LN(e_T(c)), t)      e_I: image tokens, e_T: text tokens
    r(place) = W_out LN(p + Attention(W_p p, LN(h), LN(h)))                p: the waves of a place in the picture
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .condition_network import text_layers, words_of
from .config import AdapterConfig
from .layers import Attention, Block, latent_of, level_layers, positions, told_level


class CrossModalNetwork(nn.Module):
    """r_phi(x_0, c, t) where x_0 is seen through CLIP's image encoder. It starts at exactly zero."""

    def __init__(self, config: AdapterConfig, operations: Any, dtype: Any = torch.float32, device: Any = None):
        super().__init__()
        self.config = config
        width, where = config.width, {"dtype": dtype, "device": device}
        self.norm_image = operations.LayerNorm(config.vision_width, **where)
        self.image = operations.Linear(config.vision_width, width, **where)
        for name, layer in text_layers(config, operations, **where).items():
            self.add_module(name, layer)
        self.level = level_layers(config, operations, **where)
        self.blocks = nn.ModuleList(Block(config, operations, **where) for _ in range(config.depth))
        self.places = operations.Linear(width, width, **where)
        self.norm_read = operations.LayerNorm(width, **where)
        self.read = Attention(width, config.heads, operations, **where)
        self.norm_out = operations.LayerNorm(width, **where)
        self.out = operations.Linear(width, config.latent_channels * config.patch**2, **where)

    def forward(
        self, clean: Tensor, text: Tensor, angle: Tensor, frames: int = 1, picture: Tensor | None = None
    ) -> Tensor:
        """clean (B, C, H, W) gives r its shape alone; picture (B, P, vision_width): CLIP's tokens of what is seen.

        text (B, L, text_width) or a map (B, labels, rows, columns), angle (B,); returns (B, C, H, W).
        """
        tokens = self.image(self.norm_image(picture))
        words = words_of(self, text)
        level = told_level(self.level, angle, tokens)
        for block in self.blocks:
            tokens = block(tokens, words, level, frames)
        height, width = clean.shape[-2:]
        rows, columns = (-(-side // self.config.patch) for side in (height, width))
        places = positions(rows, columns, tokens.shape[-1], tokens).expand(len(tokens), -1, -1)
        found = places + self.read(self.places(places), self.norm_read(tokens))
        return latent_of(self.out(self.norm_out(found)), rows, self.config.patch)[..., :height, :width]
