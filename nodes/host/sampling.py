"""Sampling runs of our own nodes, through the host's guider and samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .flow import in_dimensions_of, is_flow, noise_to
from .frames import in_one_window
from .others import without_guidance

OF_A_NODE = "palimpsest_of_a_node"  # key in a run's options: one of our nodes runs the model, no sampler does
SOURCE_PASS = "palimpsest_source_pass"  # key in a call's options: it is a source's own, no edit is drawn in it


def as_source_pass(model_options: dict) -> dict:
    """A model call's options, marked as those of a pass that a source has for itself."""
    return model_options | {"transformer_options": model_options["transformer_options"] | {SOURCE_PASS: True}}


def in_source_pass(options: dict) -> bool:
    """Whether transformer options are of such a pass, in which nothing that is for the edit may act."""
    return SOURCE_PASS in options


def sample(
    model: Any,
    function: Callable,
    start: Tensor,
    *,
    sigmas: Tensor,
    positive: list,
    negative: list | None = None,
    guidance: float = 1.0,
    callback: Any = None,
    guided: bool = False,
) -> Tensor:
    """Run a sampler function of ours under the host's CFGGuider, so that LoRA, ControlNet, areas and hooks all act.

    start (B, C, H, W), as on a LATENT socket, is what the function is given, in the model's space, and no noise is
    added; a flow model, which would fade it, is given it as noise. Returns a LATENT tensor. Patches find OF_A_NODE
    in the options: such a run looks at the picture as it is, often without the edit's prompt. It sees all frames of a
    clip at once, also where the edit is sampled in the host's context windows. At guidance 1 other nodes' guidance is
    left out, for it would be a part of what is looked at or learned; guided: it acts, as a picture is drawn.
    """
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    options = guider.model_options.get("transformer_options", {}) | {OF_A_NODE: True}
    guider.model_options = in_one_window(guider.model_options | {"transformer_options": options})
    if not guided and guidance == 1.0:
        guider.model_options = without_guidance(guider.model_options)
    guider.set_conds(positive, positive if negative is None else negative)
    guider.set_cfg(guidance)
    sampler, noise = comfy.samplers.KSAMPLER(function), torch.zeros_like(start)
    if is_flow(model) and float(sigmas[0]) > 0:
        noise, start = faded_in(model, start, float(sigmas[0])), noise
    return guider.sample(noise, start, sampler, sigmas, callback=callback, disable_pbar=True, seed=0)


def faded_in(model: Any, start: Tensor, sigma: float) -> Tensor:
    """The noise with which a run on an empty latent begins in a LATENT tensor."""
    x = model.model.process_latent_in(start.clone())
    return noise_to(model.get_model_object("model_sampling"), sigma, x, torch.zeros_like(x))


@dataclass(frozen=True)
class VisitLevels:
    """A host sampler function: one model call at each of some noise levels, on latents that are already known."""

    latents: Tensor

    def __call__(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable=False, **_):
        """sigmas: the levels, and one more that is not visited. latents (levels, B, C, H, W). Returns x."""
        for i, (latent, sigma) in enumerate(zip(self.latents, sigmas[:-1].tolist(), strict=True)):
            latent = in_dimensions_of(latent, x).to(x)
            denoised = model(latent, latent.new_full((len(latent),), sigma), **(extra_args or {}))
            if callback is not None:
                callback({"i": i, "x": latent, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return x
