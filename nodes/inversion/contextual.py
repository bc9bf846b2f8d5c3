"""Inversion on the path that a context adapter shifts: ContextDiff's eq. 11 solved upward, and recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import host
from ..contextdiff import ContextSampling, SamplerSettings, noisiest

if TYPE_CHECKING:
    from .ddim import InvertSettings


def context_sampling(adapter: Any, settings: InvertSettings) -> ContextSampling | None:
    """The Context-Aware Sampler that goes up and undoes it, at its defaults but for these; None without adapter."""
    if adapter is None:
        return None
    chosen = SamplerSettings(strength=settings.context_strength, inversion_refinements=settings.context_refinements)
    return ContextSampling(adapter, chosen)


class RecordContext:
    """A host sampler function: the context-aware inversion, and the latent at every level."""

    def __init__(self, sampling: ContextSampling):
        self.sampling, self.latents = sampling, []

    def __call__(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable=False, **_: Any):
        """x (B, C, H, W) at sigmas[0] = 0; sigmas ascending. Returns x unchanged: the result is in `latents`."""
        self.latents = []

        def keep(state: Tensor) -> None:
            self.latents.append(state.to("cpu", torch.float32, copy=True))

        def noted(step: dict) -> None:
            keep(step["x"])
            if callback is not None:
                callback(step)

        keep(self.sampling(model, x, sigmas, extra_args, noted, disable))
        return x


def how_to_begin(model: Any, levels: tuple[float, ...]) -> list[str]:
    """What a report says where the sampler has a bias at the first level, which it does not find on NOISE."""
    if host.is_flow(model) or levels[0] >= noisiest(model.get_model_object("model_sampling")):
        return []
    return [
        "the noise levels begin below the model's noisiest: sample from noise with DisableNoise instead of "
        "inverted_noise, which begins beside the adapter's path"
    ]


def require_undone(model: Any, sampling: ContextSampling | None, levels: tuple[float, ...]) -> None:
    """Raise ValueError where the way down would begin without the bias that the way up ends with.

    A flow-matching model's run begins in noise, whose bias is 0 by k_T := 0, which is true at pure noise only.
    """
    if sampling is not None and host.is_flow(model) and levels[0] < 1.0:
        raise ValueError(
            f"with context_adapter a flow-matching model is inverted up to pure noise (sigma 1), sigmas begin at "
            f"{levels[0]:.4g}: connect all of them."
        )
