"""Feature Blend put together: presets, memory, and the model that blends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import host
from . import blend as feature_blend
from . import cache as feature_cache
from . import layers as layering
from .layers import FeatureLayer
from .weights import BlendWeights

TECHNIQUE = "Feature Blend"
AUTO, CACHED, SAME_STEP = "auto", "cached", "same step"
FEATURES = (AUTO, CACHED, SAME_STEP)


@dataclass(frozen=True)
class BlendSettings:
    """What is blended, where and when; see PalimpsestFeatureBlend for what each does to the picture.

    layers chooses among a model's features; grow in cells of the latent.
    """

    alpha_inside: float
    alpha_outside: float
    layers: Callable[[list[FeatureLayer]], list[FeatureLayer]]
    start_percent: float = 0.0
    end_percent: float = 1.0
    latents_until: float = 0.0
    grow: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing of the reference would be blended into a feature."""
        return self.alpha_inside == self.alpha_outside == 1.0 or self.start_percent == self.end_percent


# PFB-Diff's scripts (arXiv:2306.16894, authors' code): t_combine 0 and 200 of 1000, self_replace_step 0.5 and 0.8, of
# which the complement is the share of sampling; a background's mask leaves out the object grown by 18 of 512 pixels.
PRESETS = {
    "paper": BlendSettings(0.5, 0.5, layering.paper),
    "PFB-Diff object": BlendSettings(1.0, 0.0, layering.pfb_object, latents_until=0.5),
    "PFB-Diff background": BlendSettings(
        1.0, 0.0, layering.pfb_background, end_percent=0.8, latents_until=0.2, grow=-18 / 8
    ),
}


def grown(mask: Tensor, cells: float, latent: tuple[int, int]) -> Tensor:
    """A MASK whose white has grown (or, below 0, shrunk) by so many cells of a latent of (height, width)."""
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    radius = round(abs(cells) * mask.shape[-1] / latent[1])
    if radius == 0:
        return mask

    def dilated(white: Tensor) -> Tensor:
        return torch.nn.functional.max_pool2d(white[:, None], 2 * radius + 1, 1, radius)[:, 0]

    return dilated(mask) if cells > 0 else 1 - dilated(1 - mask)


@dataclass(frozen=True)
class Applied:
    """A model that blends, and what a person should know of it."""

    model: Any
    report: str


def check(
    model: Any, trajectory: host.Trajectory, settings: BlendSettings, mask: Tensor | None, weights: BlendWeights | None
) -> None:
    """Raise ValueError for what cannot be blended, or would silently blend nothing."""
    host.require_unet(model, TECHNIQUE)
    if trajectory.layout != host.layout_fingerprint(model):
        raise ValueError(
            "the trajectory was recorded with another model architecture: invert the picture with this model."
        )
    if weights is not None and weights.layout != trajectory.layout:
        raise ValueError(
            "the blend weights were tuned on another model architecture: load the checkpoint family they were tuned "
            "on, or tune again."
        )
    if settings.end_percent < settings.start_percent:
        raise ValueError(
            f"end_percent {settings.end_percent:g} lies before start_percent {settings.start_percent:g}: swap them."
        )
    if mask is not None:
        host.picture_rows(mask, mask.reshape(-1, *mask.shape[-2:]).shape[0], 1, 1)
    elif weights is None and settings.alpha_inside == 1.0 and not settings.idle:
        raise ValueError(
            "without a mask the whole picture is the inside, where alpha_inside 1 blends nothing: connect a mask that "
            "is white where the edit may act, or choose preset 'paper'."
        )


def apply(
    model: Any,
    trajectory: host.Trajectory,
    prompt: list,
    settings: BlendSettings,
    reference: str = feature_blend.TRAJECTORY,
    features: str = AUTO,
    quirks: bool = False,
    seed: int = 0,
    mask: Tensor | None = None,
    weights: BlendWeights | None = None,
    callback: Any = None,
) -> Applied:
    """A clone of the model into whose features the reference's are blended. With both alphas 1, the model bit for bit.

    prompt describes the reference. mask: white where the edit acts. weights replace layers and both alphas. callback
    hears of the recording, where there is one. Raises ValueError for other architectures, masks that are missing or
    unusable, and memory that is not there.
    """
    check(model, trajectory, settings, mask, weights)
    if weights is None:
        layers = [] if settings.idle else settings.layers(layering.feature_layers(model))
        alphas = {layer.key: (settings.alpha_inside, settings.alpha_outside) for layer in layers}
    else:
        layers = weights.on(layering.feature_layers(model))
        alphas = {layer.key: (weights.alphas[str(layer)],) * 2 for layer in layers}
    if mask is not None:
        mask = grown(mask, settings.grow, trajectory.latents.shape[-2:])
    if not layers and (mask is None or settings.latents_until == 0.0):
        return Applied(model.clone(), "both alphas are 1: nothing is blended")
    sampling = model.get_model_object("model_sampling")
    blend = feature_blend.BlendFeatures(
        name=feature_blend.settings_name(),
        reference=feature_blend.REFERENCES[reference](trajectory, seed),
        features=feature_blend.SameStep(prompt),
        alphas=alphas,
        sources=feature_blend.sources_of(layers, quirks),
        window=(sampling.percent_to_sigma(settings.start_percent), sampling.percent_to_sigma(settings.end_percent)),
        pinned_above=sampling.percent_to_sigma(settings.latents_until),
        mask=mask,
        quirks=quirks,
    )
    feature_blend.source(prompt)
    said = []
    if layers:
        blend, how = with_features(model, blend, prompt, features, callback)
        said += [f"blends {layering.written(layers)}", how]
        said += [f"learned weights: {weights}"] if weights is not None else []
    if mask is None and settings.latents_until > 0:
        said.append("no mask, so latents are not blended")
    elif settings.latents_until > 0:
        said.append(f"latents outside of the mask held for {100 * settings.latents_until:.0f} % of sampling")
    return Applied(feature_blend.install(model, blend), "; ".join(said))


def with_features(
    model: Any, blend: feature_blend.BlendFeatures, prompt: list, features: str, callback: Any
) -> tuple[feature_blend.BlendFeatures, str]:
    """(blend, a sentence): with recorded features where they were asked for or fit into a quarter of the free memory.

    Raises ValueError where they were asked for and do not fit, or need pictures that only the edit's prompt has.
    """
    present = layering.feature_layers(model)
    needed = feature_cache.expected_bytes(blend, present, model.model.get_dtype_inference())
    free, levels = feature_cache.free_memory(), len(feature_cache.levels_in(blend))
    size = f"{levels} levels, {needed / 1e6:.1f} MB"
    with_pictures = model.model.diffusion_model.in_channels > model.get_model_object("latent_format").latent_channels
    unseen = with_pictures and not any(key.startswith("concat_") for _, extra in prompt for key in extra)
    if features == CACHED and unseen:
        raise ValueError(
            "features 'cached' of an inpaint or instruct model need its pictures on the source prompt, too: put the "
            "prompt through the same conditioning node, or set features to 'same step'."
        )
    if features == CACHED and needed > free:
        raise ValueError(
            f"features 'cached' need {needed / 1e9:.1f} GB ({levels} levels), {free / 1e9:.1f} GB of memory are free: "
            "set features to 'same step', or blend fewer layers or levels."
        )
    if features == CACHED or (features == AUTO and not unseen and needed <= feature_cache.SHARE * free):
        cached = feature_cache.record(model, blend, prompt, callback)
        return replace(blend, features=cached), f"features cached ({size} of ordinary memory), no further cost a step"
    reason = f"; cached they would take {size}" if features == AUTO and not unseen else ""
    return blend, f"features made at the same step: one more row of the network a step{reason}"
