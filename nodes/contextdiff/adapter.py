"""A context adapter: r_phi under the host's memory management."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import headers, training
from .network import build, initialise


@dataclass(frozen=True, eq=False)
class ContextAdapter(training.LearnedNetwork):
    """What a CONTEXT_ADAPTER socket carries: r_phi, its AdapterConfig, and what it was trained for.

    info: what training wrote about itself (formula, steps, loss, ...).
    """

    BUILD, INITIALISE = staticmethod(build), staticmethod(initialise)

    def refuse_mismatch(self, model: Any) -> None:
        """Raise ValueError where the model's latents are not those the adapter was trained on."""
        latent_format = model.latent_format
        name, channels = type(latent_format).__name__, latent_format.latent_channels
        if (name, channels) != (self.config.latent_format, self.config.latent_channels):
            raise ValueError(
                f"the context adapter was trained on {self.config.latent_format} latents of "
                f"{self.config.latent_channels} channels, this model has {name} latents of {channels}: load an adapter "
                "for this model, or the checkpoint family it was trained with."
            )

    def __call__(self, clean: Tensor, text: Tensor, angle: float) -> Tensor:
        """r_phi(x_0, c, t) without a gradient: (B, C, H, W), text (B, L, D), one level -> (B, C, H, W), clean's dtype.

        Raises ValueError for a prompt of another width. The weights must be on the device (`load`).
        """
        self.config.refuse_text(text.shape[-1])
        network, device = self.patcher.model, self.patcher.load_device
        latent = clean.to(device, torch.float32)
        level = torch.full((len(latent),), angle, device=device)
        with torch.no_grad():
            r = network(latent, text.to(latent), level, len(latent) if self.config.video else 1)
        return r.to(clean)


def describe(adapter: ContextAdapter) -> str:
    """One line about an adapter: form, size, what it fits, how it was trained."""
    config, info = adapter.config, adapter.info
    form = "video" if config.video else "image"
    parts = [
        f"{form} adapter for {config.latent_format} latents, prompts of {config.text_width} channels",
        f"{adapter.parameters / 1e6:.2f} M parameters, {adapter.bytes / 1e6:.1f} MB (width {config.width}, depth "
        f"{config.depth}, patch {config.patch})",
    ]
    return "; ".join([*parts, *(headers.told(info) or ["untrained: it changes nothing"])])
