"""Numbers that the nodes report of their own work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.edit_metrics import psnr


def reconstruction_error(reached: Tensor, wanted: Tensor, vae: Any = None) -> dict[str, float]:
    """How near a sampled latent came to the one it should rebuild.

    reached, wanted (B, C, H, W) as on a LATENT socket. latent_rmse is relative to the wanted latent's standard
    deviation; pixel_psnr, where a VAE is given, compares the decoded pictures, over all of the batch at once, so that
    the autoencoder's own loss is not counted.
    """
    wanted = wanted.to(reached)  # with --gpu-only the host keeps latents on the GPU, ours are in ordinary memory
    numbers = {"latent_rmse": float((reached - wanted).pow(2).mean().sqrt() / wanted.std().clamp_min(1e-8))}
    if vae is not None:
        pictures = (decoded(vae, latent) for latent in (reached, wanted))
        numbers["pixel_psnr"] = float(psnr(*(batch.flatten(0, 1)[None] for batch in pictures)))
    return numbers


def decoded(vae: Any, latent: Tensor) -> Tensor:
    """A LATENT's picture through the host's VAE, (B, H, W, 3) in 0..1; of a video model's, its frames."""
    with torch.no_grad():
        pictures = vae.decode(latent).clamp(0, 1)
    return pictures.flatten(0, 1) if pictures.ndim == 5 else pictures


def error_in_words(numbers: dict[str, float]) -> str:
    """The numbers as people read them."""
    parts = [f"latent error {100 * numbers['latent_rmse']:.1f} %"]
    if "pixel_psnr" in numbers:
        parts.append(f"picture {numbers['pixel_psnr']:.1f} dB (against the autoencoder's own round trip)")
    return ", ".join(parts)
