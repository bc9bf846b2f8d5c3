"""The latents that a picture passes through on its way to noise, and the noise levels of a schedule."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels import feature_blend as maths

NEAR_LATENT = 1e-2  # relative: latents pass a scale and half precision


def nearest_level(sigmas: tuple[float, ...], sigma: float) -> int:
    """Index of the noise level nearest to sigma, by the ratio of the two (levels span four orders of magnitude)."""
    return min(range(len(sigmas)), key=lambda i: abs(math.log(max(sigmas[i], 1e-6) / max(sigma, 1e-6))))


@dataclass(frozen=True)
class Trajectory:
    """The latents a picture passes through on its way to noise: the supervision of KV Inversion, stage 1.

    sigmas: T+1 noise levels, descending, the last one 0. latents (T+1, B, C, H, W) float32 on the CPU, at those
    levels, in the model's latent scale and the host's x: x_0 + sigma eps of a diffusion model, (1 - sigma) x_0 + sigma
    eps of a flow-matching one (flow); contextual: with the bias that a context adapter gives each level. A picture of a
    video model lies without its one frame's dimension, a clip with it, (T+1, B, C, F, H, W). The fingerprints name the
    prompt and the architecture.
    """

    sigmas: tuple[float, ...]
    latents: Tensor
    guidance: float
    prompt: str
    layout: str
    flow: bool = False
    contextual: bool = False

    @property
    def pictures(self) -> int:
        """Number of pictures B."""
        return self.latents.shape[1]

    @property
    def frames(self) -> int:
        """Frames F of the latent; 1 of a picture."""
        return self.latents.shape[3] if self.latents.ndim == 6 else 1

    @property
    def steps(self) -> int:
        """Number of steps T between the T+1 levels."""
        return len(self.sigmas) - 1

    def require_sound(self) -> None:
        """Raise ValueError where levels and latents do not go together."""
        if (
            self.latents.ndim not in (5, 6)
            or len(self.latents) != len(self.sigmas)
            or self.steps < 1
            or self.sigmas[-1] != 0
        ):
            raise ValueError(
                f"the trajectory has {len(self.sigmas)} noise levels for latents of shape {tuple(self.latents.shape)}: "
                "connect one of Invert Picture."
            )
        if any(high <= low for high, low in itertools.pairwise(self.sigmas)):
            raise ValueError("the trajectory's noise levels do not fall to 0: connect one of Invert Picture.")

    def begins_at(self, latent: Tensor) -> bool:
        """Whether a latent (B, C, H, W) is the inverted noise."""
        return same_latent(latent, self.latents[0])

    def check_batch(self, x: Tensor) -> None:
        """Refuse a batch or a size other than the trajectory's, and another number of frames than a clip's."""
        pictures, (height, width) = self.pictures, self.latents.shape[-2:]
        if pictures not in (1, len(x)):
            raise ValueError(
                f"the trajectory holds {pictures} pictures, the sampled batch has {len(x)}: sample {pictures} at a "
                "time, or invert a single picture to use it for any batch."
            )
        if (height, width) != tuple(x.shape[-2:]):
            raise ValueError(
                f"the trajectory was recorded for a latent of {width} x {height}, sampling runs at {x.shape[-1]} x "
                f"{x.shape[-2]} (8 pixels a cell, 16 in FLUX.2 and Wan 2.2 5B): resize the picture to the inverted "
                "size, or invert again."
            )
        if self.frames > 1:
            self.check_frames(x)

    def check_frames(self, x: Tensor) -> None:
        """Refuse a latent (B, C, H, W) or (B, C, F, H, W) of another number of frames than the trajectory's."""
        frames = x.shape[2] if x.ndim == 5 else 1
        if frames != self.frames:
            raise ValueError(
                f"the trajectory was recorded for a latent of {self.frames} frames, the sampled one has {frames}: "
                "sample one of as many, or invert the whole clip."
            )

    def require_picture(self, technique: str) -> None:
        """Raise ValueError for a clip."""
        if self.frames > 1:
            raise ValueError(
                f"the trajectory is that of a clip of {self.frames} latent frames, {technique} looks at a picture: "
                "invert one, as a latent of one frame."
            )


def same_latent(latent: Tensor, recorded: Tensor) -> bool:
    """Whether a latent (B, C, H, W) is a recorded one, (B or 1, C, H, W); each of a batch."""
    if recorded.shape[1:] != latent.shape[1:] or len(recorded) not in (1, len(latent)):
        return False
    recorded = recorded.to(latent)
    return bool((latent - recorded).norm() <= NEAR_LATENT * recorded.expand_as(latent).norm())


def latents_at(trajectory: Trajectory, sigma: float) -> Tensor:
    """The reference (B, C, H, W) at any noise level, on the straight lines on which Euler walks between the recorded.

    Above the noisiest level the line through it and the clean picture goes on.
    """
    levels = trajectory.sigmas
    if sigma >= levels[0]:
        i, j = 0, len(levels) - 1
    else:
        j = next((j for j, level in enumerate(levels) if level <= sigma), len(levels) - 1)
        i = j - 1
    x, x_next = trajectory.latents[i], trajectory.latents[j]
    return maths.between_levels(x, x_next, levels[i], levels[j], sigma)


def renoised(trajectory: Trajectory, seed: int) -> Trajectory:
    """The clean original under one fixed noise at every level, as the model's kind has it, not its inverted latents."""
    clean = trajectory.latents[-1]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    signals = [1.0 - sigma if trajectory.flow else 1.0 for sigma in trajectory.sigmas]
    levels = zip(signals, trajectory.sigmas, strict=True)
    return replace(trajectory, latents=torch.stack([signal * clean + sigma * noise for signal, sigma in levels]))
