"""r_phi of ContextDiff: a small network over a picture's latent and its prompt that says where the path should shift.

Queries are patches of the latent, keys and values are the prompt's tokens; the output has the latent's shape and starts
at exactly zero. The video form adds attention within a frame and to the frames before. The paper reads picture and
text through CLIP; here the picture is the latent itself, so that r_phi(x0_hat, c, t) costs no VAE pass in sampling.
`cross_modal` has the paper's network, `released` the one of the authors' program.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import host
from ..training import generator
from .condition_network import text_layers, words_of
from .config import LATENT, RELEASED, AdapterConfig
from .cross_modal import CrossModalNetwork
from .layers import Block, latent_of, level_layers, positions, told_level
from .released import ReleasedNetwork


class ContextNetwork(nn.Module):
    """r_phi(x_0, c, t): see the module. Layers come from `operations`, a set of the host's comfy.ops."""

    def __init__(self, config: AdapterConfig, operations: Any, dtype: Any = torch.float32, device: Any = None):
        super().__init__()
        self.config = config
        width, where = config.width, {"dtype": dtype, "device": device}
        numbers = config.latent_channels * config.patch**2
        self.patches = operations.Linear(numbers, width, **where)
        for name, layer in text_layers(config, operations, **where).items():
            self.add_module(name, layer)
        self.level = level_layers(config, operations, **where)
        self.blocks = nn.ModuleList(Block(config, operations, **where) for _ in range(config.depth))
        self.norm_out = operations.LayerNorm(width, **where)
        self.out = operations.Linear(width, numbers, **where)

    def forward(
        self, clean: Tensor, text: Tensor, angle: Tensor, frames: int = 1, picture: Tensor | None = None
    ) -> Tensor:
        """r for latents, prompts and noise levels; picture: what other kinds see, None for this one.

        clean x_0 (B, C, H, W) in the model's own latent scale, text (B, L, text_width) or the map (B, labels, rows,
        columns) of a class or layout, angle (B,) from `noise_angle`; B = clips * frames for a video adapter. Returns
        (B, C, H, W) in clean's dtype. Any H, W: the last patches are filled up by repeating the border.
        """
        height, width = clean.shape[-2:]
        patch = self.config.patch
        filled = F.pad(clean, (0, -width % patch, 0, -height % patch), mode="replicate")
        cut = F.pixel_unshuffle(filled, patch)
        rows, columns = cut.shape[-2:]
        tokens = self.patches(cut.flatten(2).mT)
        tokens = tokens + positions(rows, columns, tokens.shape[-1], tokens)
        text = words_of(self, text)
        level = told_level(self.level, angle, tokens)
        for block in self.blocks:
            tokens = block(tokens, text, level, frames)
        return latent_of(self.out(self.norm_out(tokens)), rows, patch)[..., :height, :width]


NETWORKS = {LATENT: ContextNetwork, RELEASED: ReleasedNetwork}  # the kinds that see through CLIP share one


def closed(name: str) -> bool:
    """Whether a layer starts at zero, so that what it belongs to changes nothing until it is trained."""
    return name == "out" or name.endswith((".spatial.out", ".temporal.out", ".film"))


def initialise(network: nn.Module, seed: int) -> None:
    """Untrained weights: the output is exactly zero (but the released code's), the video form equals the image form.

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


def build(config: AdapterConfig, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> nn.Module:
    """An r_phi with empty weights, of layers that the host casts and moves as it does its own."""
    import comfy.ops

    return NETWORKS.get(config.kind, CrossModalNetwork)(config, host.whole(comfy.ops.manual_cast), dtype, device)
