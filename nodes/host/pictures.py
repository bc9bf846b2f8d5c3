"""Models that are given a picture beside the latent, as InstructPix2Pix is: how many channels, and in what unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import patch_of
from .prompts import is_unet

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


def in_words(model: Any) -> str:
    """A model that is given pictures beside the latent, as messages name it."""
    return type(model.model).__name__ if picture_channels(model) else "an inpainting model"


def needs_pictures(model: Any) -> bool:
    """Whether a model is given pictures beside the latent, as those for inpainting and instructions are."""
    network, channels = model.model.diffusion_model, model.get_model_object("latent_format").latent_channels
    if is_unet(model):
        return network.in_channels > channels
    flat, clip = (getattr(getattr(network, name, None), "weight", None) for name in ("img_in", "patch_embedding"))
    if clip is not None and clip.ndim == 5:  # Wan: (C, channels that are read, 1, 2, 2)
        return clip.shape[1] > channels
    return flat is not None and flat.shape[1] > channels * patch_of(network) ** 2


def shows_picture(prompt: list) -> bool:
    """Whether a CONDITIONING carries pictures for the network's input, as those of the host's nodes for such models."""
    return any(str(key).startswith("concat_") for _, extra in prompt for key in extra)


def unseen_picture(model: Any, prompt: list, name: str = "the prompt") -> str:
    """What a report adds where a prompt shows such a model no picture, which it then takes for an empty one."""
    if not picture_channels(model) or shows_picture(prompt):
        return ""
    return (
        f"; note: {name} shows {in_words(model)} no picture to change: put it through InstructPixToPixConditioning, "
        "with this picture"
    )


def require_text_to_image(model: Any, technique: str, way_out: str) -> None:
    """Raise ValueError for a model that changes a picture it is given, where a technique has none to give."""
    if picture_channels(model):
        raise ValueError(
            f"{technique} teaches pictures by their captions, and {in_words(model)} changes a picture that it is "
            f"given beside the caption: {way_out}."
        )


def picture_channels(model: Any) -> PictureChannels:
    """Those of a host MODEL. Inpainting models are no such models: theirs are a mask and what it leaves."""
    read = getattr(model.model, "process_ip2p_image_in", None)
    if read is None:
        return PictureChannels(0)
    number = model.model.diffusion_model.in_channels - model.get_model_object("latent_format").latent_channels
    return PictureChannels(number, float(read(torch.ones(1))))
