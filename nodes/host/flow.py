"""Flow-matching models among the host's, and how a sampler is made to begin in a latent that was found, not drawn.

The host begins a flow's run at t * noise + (1 - t) * latent: at t = 1 a latent is multiplied by 0, so that inverted
noise has to come as NOISE.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOWEST = 1e-3  # stands for noise level 0, at which a velocity cannot be told from a picture that needs no denoising
FLOW, DIFFUSION = "flow", "diffusion"


def is_flow_sampling(sampling: Any) -> bool:
    """Whether a host's model_sampling has the straight path x = (1 - t) x_0 + t eps."""
    import comfy.model_sampling

    edits = getattr(comfy.model_sampling, "IMG_TO_IMG_FLOW", ())  # goes from a picture to a picture, without noise
    return isinstance(sampling, comfy.model_sampling.CONST) and not isinstance(sampling, edits)


def is_flow(model: Any) -> bool:
    """Whether a host MODEL is a flow-matching one, as it samples now (ModelSampling nodes count)."""
    return is_flow_sampling(model.get_model_object("model_sampling"))


def kind_of_path(model: Any, technique: str) -> str:
    """FLOW or DIFFUSION. Raises ValueError, with the model's name, where a path from noise to picture is neither."""
    import comfy.model_sampling

    sampling = getattr(model.model, "model_sampling", None)
    sampling = sampling if sampling is None else model.get_model_object("model_sampling")
    if is_flow_sampling(sampling):
        return FLOW
    edits = getattr(comfy.model_sampling, "IMG_TO_IMG", ())
    if isinstance(sampling, comfy.model_sampling.EPS) and not isinstance(sampling, edits):
        return DIFFUSION
    raise ValueError(
        f"{technique} works with diffusion models (SD 1.x, SD 2.x, SDXL and their like) and flow-matching models "
        f"(SD3, Flux, Z-Image, Qwen-Image and their like); the connected {type(model.model).__name__} samples on "
        "another path. Load a model of one of those families."
    )


def require_flow(sampling: Any, technique: str, way_out: str) -> None:
    """Raise ValueError where a run's model_sampling is not a flow's."""
    if not is_flow_sampling(sampling):
        raise ValueError(
            f"{technique} works with flow-matching models (SD3, Flux, Z-Image, Qwen-Image and their like); the "
            f"connected model is a diffusion model: {way_out}."
        )


def require_flow_levels(levels: Iterable[float]) -> None:
    """Raise ValueError for noise levels of another kind of model: a flow's lie between 1, pure noise, and 0."""
    if (highest := max(levels, default=0.0)) > 1.0 + 1e-5:
        raise ValueError(
            f"the noise levels go up to {highest:.4g}, those of a flow-matching model from 1 to 0: connect a scheduler "
            "that is given this model."
        )


def few_steps_only(model: Any) -> bool:
    """Whether a model is known by its layout as distilled to a few steps. Others (Turbo, Lightning) have no mark."""
    return type(model.model.model_config).__name__ == "FluxSchnell"


def reads_guidance(model: Any) -> bool:
    """Whether a model was distilled to a guidance that it is given as an input (FLUX.1 dev): it is sampled at cfg 1."""
    return bool(getattr(getattr(model.model.diffusion_model, "params", None), "guidance_embed", False))


# ---- noise that begins in a latent ----------------------------------------------------------------------------------


def noise_to(sampling: Any, sigma: float, x: Tensor, latent: Tensor) -> Tensor:
    """The noise with which a run that starts at sigma on a latent begins in x; all (B, C, ...), in the model's space.

    The host's own start is asked, which is a * noise + b(latent) for every kind of model. Raises ValueError at 0.
    """
    if not sigma > 0.0:
        raise ValueError(
            f"a sampling run that starts at noise level {sigma:g} has no noise: give it SIGMAS from above 0."
        )
    level, highest = x.new_tensor([sigma]), float(sampling.sigma_max)
    most = math.isclose(highest, sigma, rel_tol=1e-05) or sigma > highest
    without = sampling.noise_scaling(level, torch.zeros_like(x), latent, most)
    slope = sampling.noise_scaling(level, torch.ones_like(x), torch.zeros_like(x), most)
    return (x - without) / slope


def in_dimensions_of(x: Tensor, latent: Tensor) -> Tensor:
    """A picture's latent (B, C, H, W) as a clip of one frame (B, C, 1, H, W) where the other is a clip's."""
    return x.unsqueeze(2) if latent.ndim == x.ndim + 1 else x


def as_sampled(model: Any, x: Tensor) -> Tensor:
    """A picture's latent (B, C, H, W) as a host MODEL samples it: a clip of one frame where it is a model for clips."""
    clips = model.get_model_object("latent_format").latent_dimensions == 3
    return x.unsqueeze(2) if clips and x.ndim == 4 else x


def before_fading(x: Tensor, sigma: float) -> Tensor:
    """The latent that a flow's run without noise, which multiplies by 1 - sigma, begins in x with.

    At pure noise (sigma 1) there is none: x itself, which counts for nothing beside inverted_noise.
    """
    return x / (1.0 - sigma) if sigma < 1.0 else x


@dataclass(frozen=True, eq=False)
class FoundNoise:
    """A NOISE of the host: what makes a run begin in a picture's inverted noise, on whatever latent it is given.

    x (B, C, H, W) at noise level sigma, in the model's space.
    """

    model: Any
    x: Tensor
    sigma: float
    seed: int = 0

    def generate_noise(self, latent: dict) -> Tensor:
        """Noise of the shape of a LATENT. Raises ValueError for another size or batch."""
        samples = latent["samples"]
        x = in_dimensions_of(self.x, samples).to(samples.device, torch.float32)
        if x.shape[1:] != samples.shape[1:] or len(samples) % len(x):
            raise ValueError(
                f"the inverted noise is for latents of shape {tuple(x.shape)}, the sampled one has "
                f"{tuple(samples.shape)}: connect the latent that was inverted, or Invert Picture's noise, as "
                "latent_image."
            )
        x = x.repeat(len(samples) // len(x), *[1] * (x.ndim - 1))
        inside = samples.float()
        if torch.count_nonzero(inside):  # as the host's sampler does
            inside = self.model.model.process_latent_in(inside)
        return noise_to(self.model.get_model_object("model_sampling"), self.sigma, x, inside)
