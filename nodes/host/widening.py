"""A model that is given a picture beside the latent, made of one that is not: the host's own class with more inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.instruction_training import with_picture_channels
from .model import require_unet, single_device
from .pictures import picture_channels

FIRST = "diffusion_model.input_blocks.0.0.weight"


def is_blank(model: Any) -> bool:
    """Whether a MODEL's picture channels have learned nothing yet."""
    channels = picture_channels(model).number
    return channels > 0 and not bool(original_weights(model)[FIRST][:, -channels:].any())


def original_weights(model: Any, prefix: str = "diffusion_model.") -> dict[str, Tensor]:
    """A MODEL's weights by name as its file has them, without patches."""
    return {name: found[0][0] for name, found in model.get_key_patches(prefix).items()}


def with_channels(model: Any, technique: str) -> Any:
    """A MODEL with channels for a picture, blank ones, and all that is patched on the given one; which stays as it is.

    It draws what the given one draws, whatever the picture. Its weights are copies. Raises ValueError for models that
    the host does not know in such a form.
    """
    import comfy.model_patcher

    model = single_device(model)
    config, kind = edit_classes(model, technique)
    with torch.inference_mode():
        network = kind(config, model_type=model.model.model_type, device=model.offload_device)
        weights = original_weights(model, "")
        odd = next((name for name, weight in weights.items() if type(weight) not in (Tensor, torch.nn.Parameter)), None)
        if odd is not None:
            raise ValueError(
                f"{technique} cannot add channels for a picture to a quantised model ({odd} is one of its weights): "
                "load the checkpoint in half precision."
            )
        channels = model.model.latent_format.latent_channels
        network.load_state_dict(weights | {FIRST: with_picture_channels(weights[FIRST], channels)}, strict=True)
    made = comfy.model_patcher.ModelPatcher(network, model.load_device, model.offload_device)
    wide = model.clone(model_override=made.get_clone_model_override())
    wide.cached_patcher_init = None  # where the host would load the narrow one again
    if FIRST in wide.patches:  # LoRAs on the first convolution: on the channels that they know
        narrow = 1, 0, channels
        wide.patches[FIRST] = [(*patch[:3], patch[3] or narrow, *patch[4:]) for patch in wide.patches[FIRST]]
    return wide


def edit_classes(model: Any, technique: str) -> tuple[Any, type]:
    """(configuration, class) of the host's InstructPix2Pix model of a MODEL's family."""
    import comfy.model_base
    import comfy.supported_models

    require_unet(model, technique)
    base, wide = comfy.model_base, comfy.supported_models
    families = {  # exactly these: the host would take a pruned SDXL's file for another model
        wide.SD15: (wide.SD15_instructpix2pix, base.SD15_instructpix2pix),
        wide.SDXL: (wide.SDXL_instructpix2pix, base.SDXL_instructpix2pix),
    }
    old, channels = model.model.model_config, model.model.latent_format.latent_channels
    inputs = model.model.diffusion_model.in_channels
    if type(old) not in families or inputs != channels:
        raise ValueError(
            f"{technique} trains SD 1.5 and SDXL models, and InstructPix2Pix models of both; the connected model is "
            f"{type(old).__name__} with {inputs} input channels: load another checkpoint."
        )
    config_class, model_class = families[type(old)]
    config = config_class(old.unet_config)
    for name, value in vars(old).items():  # precision, operations, the noise schedule: as the given model has them
        setattr(config, name, value)
    config.unet_config = dict(old.unet_config, in_channels=2 * channels)
    return config, model_class
