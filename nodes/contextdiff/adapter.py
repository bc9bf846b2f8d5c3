"""A context adapter: r_phi under the host's memory management."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import headers, training
from .config import CLIP_PREDICTED, CLIP_SOURCE, RELEASED
from .network import build, initialise
from .sight import Sight

SEES = {
    CLIP_PREDICTED: "sees what is predicted through CLIP",
    CLIP_SOURCE: "sees its source through CLIP",
    RELEASED: "the released code's, which sees the prompt alone",
}


@dataclass(frozen=True, eq=False)
class ContextAdapter(training.LearnedNetwork):
    """What a CONTEXT_ADAPTER socket carries: r_phi, its AdapterConfig, and what it was trained for.

    info: what training wrote about itself (formula, steps, loss, ...). sight: the encoders of a kind that sees pictures
    through CLIP.
    """

    BUILD, INITIALISE = staticmethod(build), staticmethod(initialise)

    sight: Sight | None = None

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

    def require_sight(self) -> None:
        """Raise ValueError for an adapter that lacks the encoders it sees with."""
        if self.config.through_clip and self.sight is None:
            raise ValueError(
                f"the context adapter is of kind {self.config.kind!r} and has no image encoder here: take it from Load "
                "Context Adapter, with clip_vision connected there."
            )

    def seen(self, clean: Tensor, model: Any) -> Tensor | None:
        """What is seen beside a latent (B, C, H, W) in a host model's scale: tokens (B, P, W), None for most kinds.

        Raises ValueError where the encoders are missing or of another width.
        """
        if not self.config.through_clip:
            return None
        self.require_sight()
        tokens = self.sight.seen(clean, model.process_latent_out)
        self.config.refuse_vision(tokens.shape[-1])
        return tokens

    def __call__(self, clean: Tensor, text: Tensor, angle: float, picture: Tensor | None = None) -> Tensor:
        """r_phi(x_0, c, t) without a gradient: (B, C, H, W), text (B, L, D), one level -> (B, C, H, W), clean's dtype.

        picture: what is `seen`; text: a prompt, or the map of a class or layout. Raises ValueError for one of another
        width. The weights must be on the device (`load`).
        """
        self.config.refuse_told(text)
        network, device = self.patcher.model, self.patcher.load_device
        latent = clean.to(device, torch.float32)
        level = torch.full((len(latent),), angle, device=device)
        with torch.no_grad():
            frames = len(latent) if self.config.video else 1
            r = network(latent, text.to(latent), level, frames, None if picture is None else picture.to(latent))
        return r.to(clean)


def describe(adapter: ContextAdapter) -> str:
    """One line about an adapter: form, size, what it fits, how it was trained."""
    config, info = adapter.config, adapter.info
    form = "video" if config.video else "image"
    reads = f"prompts of {config.text_width} channels" if config.reads_text else f"a {config.reads} of {config.labels}"
    parts = [
        f"{form} adapter for {config.latent_format} latents, {reads}",
        *([SEES[config.kind]] if config.kind in SEES else []),
        f"{adapter.parameters / 1e6:.2f} M parameters, {adapter.bytes / 1e6:.1f} MB (width {config.width}, depth "
        f"{config.depth}, patch {config.patch})",
    ]
    return "; ".join([*parts, *(headers.told(info) or ["untrained: it changes nothing"])])
