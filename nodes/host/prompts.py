"""Whether prompts and latents are such as a model and its noise levels want them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

POOLED_WIDTH = 1280  # of CLIP ViT-bigG, which SDXL reads beside the tokens


def is_unet(model: Any) -> bool:
    """Whether a host MODEL is a U-Net; others are refused by the nodes, by name."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return isinstance(model.model.diffusion_model, UNetModel)


def text_width(model: Any) -> int | None:
    """Channels of the texts that a host MODEL's U-Net reads; None for other networks."""
    if not is_unet(model):
        return None
    return getattr(model.model.model_config, "unet_config", {}).get("context_dim")


def require_channels(model: Any, latents: Tensor) -> None:
    """Raise ValueError for latents (B, C, ...) of another kind of model."""
    channels = model.get_model_object("latent_format").latent_channels
    if latents.shape[1] != channels:
        raise ValueError(
            f"the latent has shape {tuple(latents.shape)}, this model edits pictures of {channels} latent channels: "
            "encode the picture with this checkpoint's own VAE."
        )


def reads_pooled(model: Any) -> bool:
    """Whether a model reads a pooled output beside the tokens, as SDXL does."""
    import comfy.model_base

    return isinstance(model.model, (comfy.model_base.SDXL, comfy.model_base.SDXLRefiner))


def require_width(model: Any, tokens: Tensor, name: str) -> None:
    """Raise ValueError for encoded text (B, L, D), from the input `name`, of another width than the model reads."""
    width = text_width(model)
    if width is not None and tokens.shape[-1] != width:
        raise ValueError(
            f"{name} has {tokens.shape[-1]} channels, this model reads prompts of {width}: encode the prompt with the "
            "CLIP of the checkpoint that is connected (768: SD 1.x, 1024: SD 2.x, 2048: SDXL)."
        )


def require_readable(model: Any, conditioning: list, name: str) -> None:
    """Raise ValueError for a prompt (the input `name`) that was encoded for another kind of model."""
    for tensor, extra in conditioning:
        if isinstance(tensor, Tensor):
            require_width(model, tensor, name)
        if reads_pooled(model) and "unclip_conditioning" not in extra:
            pooled = extra.get("pooled_output")
            if not isinstance(pooled, Tensor) or pooled.shape[-1] != POOLED_WIDTH:
                found = f"{pooled.shape[-1]} channels" if isinstance(pooled, Tensor) else "none"
                raise ValueError(
                    f"{name} was encoded for another kind of model: SDXL reads a pooled output of {POOLED_WIDTH} "
                    f"channels beside the tokens, this prompt has {found}. Encode it with the checkpoint's own CLIP."
                )


def require_active(model: Any, conditioning: list, sigmas: Iterable[float], name: str) -> None:
    """Raise ValueError where no prompt of the input `name` acts at one of some noise levels.

    The host's sampler leaves prompts out that are limited to other levels (ConditioningSetTimestepRange); where none is
    left it goes on with zeros for what the model would have said.
    """
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    spans = [
        (to_sigma(extra.get("start_percent", 0.0)), to_sigma(extra.get("end_percent", 1.0)))
        if {"start_percent", "end_percent"} & extra.keys()
        else (float("inf"), 0.0)
        for _, extra in conditioning
    ]
    without = [sigma for sigma in sigmas if sigma > 0 and not any(end <= sigma <= start for start, end in spans)]
    if without:
        raise ValueError(
            f"{name} acts in a part of the sampling only, at noise level {without[0]:.4g} no prompt of it does: "
            "connect it without ConditioningSetTimestepRange, or join prompts that cover 0 to 1 (Conditioning Combine)."
        )


def require_inside(conditioning: list, size: tuple[int, int], name: str) -> None:
    """Raise ValueError for a prompt whose area begins outside of a latent of (height, width)."""
    for _, extra in conditioning:
        area = extra.get("area") or ()
        if len(area) == 4 and not isinstance(area[0], str) and (area[2] >= size[0] or area[3] >= size[1]):
            raise ValueError(
                f"{name} is limited to an area that begins at {area[3] * 8}, {area[2] * 8}, outside of a picture of "
                f"{size[1] * 8} x {size[0] * 8} pixels: set x and y of ConditioningSetArea within the picture."
            )
