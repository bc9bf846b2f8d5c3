"""The adversarial term of tuning: a small discriminator that learns beside the alphas, on latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import feature_blend as maths

# The discriminator's own rate: the usual one of patch discriminators (pix2pix, arXiv:1611.07004).
DISCRIMINATOR_RATE = 2e-4


class PatchDiscriminator(nn.Module):
    """Latents (B, C, H, W) -> scores (B, 1, h, w), each for a patch of 9 x 9 cells: is it a true picture's?"""

    def __init__(self, channels: int, operations: Any, generator: torch.Generator, width: int = 64):
        super().__init__()
        sizes = ((channels, width, 1), (width, 2 * width, 2), (2 * width, 1, 1))
        self.layers = nn.ModuleList(operations.Conv2d(a, b, 3, stride, 1) for a, b, stride in sizes)
        for layer in self.layers:  # as pix2pix begins
            nn.init.normal_(layer.weight, 0.0, 0.02, generator)
            nn.init.zeros_(layer.bias)

    def forward(self, latent: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(F.leaky_relu(second(F.leaky_relu(first(latent), 0.2)), 0.2))


class Opponent:
    """The adversarial term: a patch discriminator that learns beside what it judges to tell it from true latents.

    clean (B, C, H, W): true latents, by whose spread all are measured, and which are shown where `loss` has no others.
    """

    def __init__(self, clean: Tensor, seed: int):
        import comfy.ops

        self.scale = clean.std().clamp_min(1e-6)
        self.real = mirrored(clean / self.scale)
        generator = torch.Generator().manual_seed(seed)
        self.network = PatchDiscriminator(clean.shape[1], comfy.ops.disable_weight_init, generator)
        self.network.to(clean.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), DISCRIMINATOR_RATE, betas=(0.5, 0.999))

    def loss(self, denoised: Tensor, true: Tensor | None = None) -> Tensor:
        """The term in the loss of what made `denoised`, after one step of the discriminator's own."""
        real = self.real if true is None else mirrored(true.float() / self.scale)
        fake = denoised.float() / self.scale
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)
        self.optimiser.zero_grad(set_to_none=True)
        maths.discriminator_loss(self.network(real), self.network(fake.detach())).backward()
        self.optimiser.step()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        return maths.generator_loss(self.network(fake))


def mirrored(latents: Tensor) -> Tensor:
    """Latents, and what a mirror shows of them: pictures are few."""
    return torch.cat([latents, latents.flip(-1)])
