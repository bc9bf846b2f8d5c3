"""Models that are given a picture beside the latent, as InstructPix2Pix is: how many channels, and in what unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GIVEN = "concat_latent_image"  # the host's key in a CONDITIONING for the latent of that picture


@dataclass(frozen=True)
class PictureChannels:
    """The channels of a model's input that are a picture to change, and the unit in which the network reads them.

    number: 0 for models without. scale: what a latent of the VAE is multiplied by on its way into the network. 1 for
    SD 1.5 and for SDXL as diffusers trains it, 0.13025 for CosXL Edit (arXiv:2211.09800 gives the picture as encoded).
    """

    number: int
    scale: float = 1.0

    def __bool__(self) -> bool:
        return self.number > 0

    def as_read(self, latent: Tensor) -> Tensor:
        """A picture's latent (B, C, H, W), as on a LATENT socket, as the network reads it."""
        return latent * self.scale


def picture_channels(model: Any) -> PictureChannels:
    """Those of a host MODEL. Inpainting models are no such models: theirs are a mask and what it leaves."""
    read = getattr(model.model, "process_ip2p_image_in", None)
    if read is None:
        return PictureChannels(0)
    number = model.model.diffusion_model.in_channels - model.get_model_object("latent_format").latent_channels
    return PictureChannels(number, float(read(torch.ones(1))))
