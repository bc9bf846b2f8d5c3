"""Which layers a LoRA is trained on, and what kohya's programs and the host's loaders call them."""

from __future__ import annotations

import re
from typing import Any

from .. import host
from .settings import TECHNIQUE

# Every linear layer, and every 1 x 1 convolution, inside the spatial transformers.
TRANSFORMERS = re.compile(
    r"^lora_unet_.*_attentions_\d+_(proj_(in|out)|transformer_blocks_\d+_(attn[12]_to|ff_net)_.*)$"
)
CONVOLUTIONS = re.compile(r"^lora_unet_(conv_(in|out)|.*_(resnets_\d+_conv(1|2|_shortcut)|(down|up)samplers_0_conv))$")
ENCODERS = {"clip_l": "lora_te1_", "clip_g": "lora_te2_", "clip_h": "lora_te_"}  # of a model with several


def unet_layers(model: Any, convolutions: bool) -> dict[str, str]:
    """kohya's name of each layer of a MODEL's U-Net that is trained, by the layer's own name in the U-Net.

    In the U-Net's own order: the host's follows from sets, another in each process, and the order decides which layer
    starts from which random numbers and to which a stopped training's optimiser states return.

    Raises ValueError for models of other families.
    """
    import comfy.lora

    host.require_unet(model, TECHNIQUE)
    wanted = (TRANSFORMERS, CONVOLUTIONS) if convolutions else (TRANSFORMERS,)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    names = {weight: name for name, weight in known.items() if any(pattern.match(name) for pattern in wanted)}
    present = (f"diffusion_model.{name}" for name, _ in model.model.diffusion_model.named_parameters())
    return {
        weight.removeprefix("diffusion_model.").removesuffix(".weight"): names[weight]
        for weight in present
        if weight in names
    }


def unet_vectors(model: Any, trained: dict[str, str]) -> dict[str, str]:
    """The key in a LoRA file of each norm's weight and bias of a MODEL's U-Net, and of the biases of `trained` layers.

    By the vector's own name in the U-Net. Norms as LyCORIS names them (w_norm, b_norm), biases as the host's trainer
    does (diff_b); layers that have only a bias to learn are left out, for other programs refuse them.
    """
    import comfy.lora

    known = comfy.lora.model_lora_keys_unet(model.model, {})
    names = {weight: name for name, weight in known.items() if name.startswith("lora_unet_")}  # diffusers' come last
    network, found = model.model.diffusion_model, {}
    for vector, parameter in network.named_parameters():
        layer, _, kind = vector.rpartition(".")
        is_norm = network.get_parameter(f"{layer}.weight").ndim == 1
        if parameter.ndim == 1 and (is_norm or layer in trained):
            end = {"weight": "w_norm", "bias": "b_norm"}[kind] if is_norm else "diff_b"
            found[vector] = f"{names[f'diffusion_model.{layer}.weight']}.{end}"
    return found


def text_layers(clip: Any) -> dict[str, str]:
    """kohya's name of each attention and feed-forward layer of a CLIP's text encoders, by its name in them.

    Raises ValueError for text encoders of other families.
    """
    import comfy.lora

    known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    weights = {
        weight
        for name, weight in known.items()
        if name.startswith("lora_te") and ".encoder.layers." in weight and weight.split(".")[0] in ENCODERS
    }
    if not weights:
        raise ValueError(
            f"{TECHNIQUE} trains CLIP text encoders (SD 1.x, SD 2.x, SDXL), the connected CLIP has none: connect the "
            "CLIP of the same checkpoint, or set text_rate to 0."
        )
    several = len({weight.split(".")[0] for weight in weights}) > 1
    return {
        name: (ENCODERS[name.split(".")[0]] if several else "lora_te_")
        + name.split(".transformer.")[1].replace(".", "_")
        for name in (weight.removesuffix(".weight") for weight in sorted(weights, key=natural))
    }


def natural(name: str) -> list:
    """A key that sorts numbers in names by their value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
