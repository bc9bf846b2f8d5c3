"""Feature Blend put together: its settings and presets, and the model that blends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...kernels.feature_blend import largest_near
from .. import host, inputs
from ..settings import Settings
from . import layers as layering
from .blend import Alpha, BlendFeatures, sources_of
from .latents import SOURCE_LATENTS, TECHNIQUE, HeldLatents, hold_latents
from .layers import Feature, FeatureLayer
from .path import INSIDE, OUTSIDE, Path
from .weights import BlendWeights

# PFB-Diff's scripts (arXiv:2306.16894, authors' code): t_combine 0 and 200 of 1000, self_replace_step 0.5 and 0.8, of
# which the complement is the share of sampling; a background's mask leaves out the object grown by 18 of 512 pixels.
# Presets name their layers by layering.PRESETS.
ALWAYS = {"start_percent": 0.0, "end_percent": 1.0, "grow_mask": 0.0}
REPLACED = {"alpha_inside": 1.0, "alpha_outside": 0.0}


@dataclass(frozen=True)
class BlendSettings(Settings):
    """What is blended, where and when; see PalimpsestFeatureBlend for what each does to the picture."""

    alpha_inside: float = 1.0
    alpha_outside: float = 0.0
    layers: str = "output, out"
    start_percent: float = 0.0
    end_percent: float = 1.0
    blend_latents_until: float = 0.5
    source_latents: str = "trajectory"
    source_features: str = "auto"
    released_code: bool = False
    grow_mask: float = 0.0
    seed: int = 0

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": ALWAYS | {"alpha_inside": 0.5, "alpha_outside": 0.5, "layers": "paper", "blend_latents_until": 0.0},
        "PFB-Diff object": ALWAYS | REPLACED | {"layers": "PFB-Diff object", "blend_latents_until": 0.5},
        "PFB-Diff background": ALWAYS
        | REPLACED
        | {"layers": "PFB-Diff background", "end_percent": 0.8, "blend_latents_until": 0.2, "grow_mask": -18 / 8},
    }

    @property
    def idle(self) -> bool:
        """Whether nothing of the source would be blended into a feature."""
        return self.alpha_inside == self.alpha_outside == 1.0


def grown(mask: Tensor, cells: float, latent: tuple[int, int]) -> Tensor:
    """A MASK whose white has grown (or, below 0, shrunk) by so many cells of a latent of (height, width)."""
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    radius = round(abs(cells) * mask.shape[-1] / latent[1])
    if radius == 0:
        return mask

    def dilated(white: Tensor) -> Tensor:
        return largest_near(largest_near(white, radius, 1), radius, 2)

    return dilated(mask) if cells > 0 else 1 - dilated(1 - mask)


def of_latent_frames(model: Any, mask: Tensor, trajectory: host.Trajectory) -> Tensor:
    """A MASK (B, h, w) of a clip's frames as one for each frame of its latent; any other as it is."""
    if trajectory.frames == 1 or mask.ndim < 3 or len(mask) == 1:
        return mask
    return host.masks_of_frames(mask, trajectory.frames, host.video_ratio(model.model))


@dataclass(frozen=True)
class Applied:
    """A model that blends, and what a person should know of it."""

    model: Any
    report: str


def check(model: Any, trajectory: host.Trajectory, mask: Tensor | None) -> None:
    """Raise ValueError for another architecture and for what is no mask."""
    host.require_words(model, TECHNIQUE)
    way_out = "invert the picture with this model"
    inputs.require_same_layout(model, trajectory.layout, "the trajectory was recorded", way_out)
    if mask is not None:
        host.picture_rows(mask, mask.reshape(-1, *mask.shape[-2:]).shape[0], 1, 1)


def check_weights(model: Any, settings: BlendSettings, mask: Tensor | None, weights: BlendWeights | None) -> None:
    """Raise ValueError for weights of another architecture, and for what would silently blend nothing."""
    if weights is not None:
        way_out = "load the checkpoint family they were tuned on, or tune again"
        inputs.require_same_layout(model, weights.layout, "the blend weights were tuned", way_out)
    elif mask is None and settings.alpha_inside == 1.0 and not settings.idle:
        raise ValueError(
            "without a mask the whole picture is the inside, where alpha_inside 1 blends nothing: connect a mask that "
            "is white where the edit may act, or choose preset 'paper'."
        )


def blended(
    model: Any, settings: BlendSettings, weights: BlendWeights | None
) -> tuple[list[FeatureLayer], dict[Feature, Alpha]]:
    """The features that are blended, and the alphas of each inside and outside."""
    present = layering.blendable(model)
    if weights is not None:
        layers = weights.on(present)
        return layers, {layer.key: (weights.alphas[str(layer)],) * 2 for layer in layers}
    layers = [] if settings.idle else layering.chosen(settings.layers, present)
    return layers, {layer.key: (settings.alpha_inside, settings.alpha_outside) for layer in layers}


def apply(
    model: Any,
    trajectory: host.Trajectory,
    prompt: list,
    settings: BlendSettings,
    *,
    mask: Tensor | None = None,
    weights: BlendWeights | None = None,
    callback: Any = None,
    remarks: host.Remarks | None = None,
) -> Applied:
    """A clone of the model into whose features the source's are blended. With both alphas 1, the model bit for bit.

    prompt describes the source. mask: white where the edit acts. weights replace layers and both alphas. callback hears
    of the recording, where there is one; remarks, of sampling runs that do not go the trajectory's way and of what is
    found in them. Raises ValueError for other architectures, masks that are missing or unusable, and memory
    that is not there.
    """
    check(model, trajectory, mask)
    check_weights(model, settings, mask, weights)
    if settings.released_code and trajectory.flow:
        raise ValueError(
            "released_code is PFB-Diff's for diffusion models, the connected model is a flow-matching one: turn it off."
        )
    heard = remarks or host.UNHEARD
    window = host.Window.of(model, settings.start_percent, settings.end_percent)
    layers, alphas = blended(model, settings, weights)
    patched, said = model.clone(), []
    if not layers and (mask is None or settings.blend_latents_until == 0.0):
        return Applied(patched, "both alphas are 1: nothing is blended")
    host.source_prompt(prompt)  # refuses one that is limited to an area
    if remarks is not None:
        apart = "between its noise levels the source is a straight line"
        host.compare_runs(patched, host.Recorded.of(trajectory, apart, from_start=False, exact=False), remarks)
    if mask is not None:
        latent = trajectory.latents.shape[-2:]
        said += [unlike] if (unlike := host.stretched(mask, latent)) else []
        mask = of_latent_frames(model, grown(host.as_encoded(mask, latent), settings.grow_mask, latent), trajectory)
        said += nowhere(mask, settings, alphas)
    source = SOURCE_LATENTS[settings.source_latents](trajectory, settings.seed)
    held = held_latents(model, source, settings, mask, heard)
    if layers:
        sources = sources_of(layers, settings.released_code)
        path = None if settings.released_code else path_of(source, alphas, mask, held, window, heard)
        blend = BlendFeatures(source, alphas, sources, window, mask, path)
        features, how = features_of(model, blend, prompt, settings.source_features, callback)
        host.attach_source(patched, blend, features)
        said += [f"blends {layering.written(layers)}", how, *beside_tokens(model)]
        said += [f"learned weights: {weights}"] if weights is not None else []
    if settings.released_code or held is not None:
        hold_latents(patched, held or HeldLatents(source, math.inf, None, settings.released_code))
    return Applied(patched, "; ".join([*said, *held_in_words(settings, mask)]))


def beside_tokens(model: Any) -> list[str]:
    """What is to be said where the prompt acts beside its tokens, behind the last feature as well."""
    family = host.family_of(model)
    if family is None or not family.pooled:
        return []
    return [
        f"{family.name} is also given its prompt as a pooled vector, which acts behind the last feature: outside of "
        "the mask the edit is near the source, not the same"
    ]


def nowhere(mask: Tensor, settings: BlendSettings, alphas: Mapping[Feature, Alpha]) -> list[str]:
    """What is to be said of a mask of one colour that leaves nothing of the edit, or nothing of the source."""
    colour = host.one_colour(mask)
    insides, outsides = zip(*alphas.values(), strict=True) if alphas else ((1.0,), (1.0,))
    if colour == "black" and (settings.blend_latents_until > 0 or 0.0 in outsides):
        return [
            "the mask is black all over, so that the edit acts nowhere and the source comes back: paint white where "
            "the edit may act"
        ]
    if colour == "white" and set(insides) == {1.0}:
        return ["the mask is white all over, so that nothing of the source is kept: paint black what is to stay"]
    return []


def held_latents(
    model: Any, source: host.Trajectory, settings: BlendSettings, mask: Tensor | None, remarks: host.Remarks
) -> HeldLatents | None:
    """What the latent is held to outside of a mask, as the settings ask for; None where it is not."""
    if mask is None or settings.blend_latents_until == 0.0:
        return None
    above = model.get_model_object("model_sampling").percent_to_sigma(settings.blend_latents_until)
    return HeldLatents(source, above, mask, settings.released_code, remarks)


def held_in_words(settings: BlendSettings, mask: Tensor | None) -> list[str]:
    """What is to be said of that."""
    if settings.blend_latents_until == 0.0:
        return []
    if mask is None:
        return ["no mask, so latents are not blended"]
    return [f"latents outside of the mask held for {100 * settings.blend_latents_until:.0f} % of sampling"]


def path_of(
    source: host.Trajectory,
    alphas: Mapping[Feature, Alpha],
    mask: Tensor | None,
    held: HeldLatents | None,
    window: host.Window,
    remarks: host.Remarks,
) -> Path:
    """The source's path, to be looked at wherever something of the source's features is blended in."""
    acts = {INSIDE: any(inside < 1 for inside, _ in alphas.values())}
    acts[OUTSIDE] = mask is not None and any(outside < 1 for _, outside in alphas.values())
    where = frozenset(region for region, acting in acts.items() if acting)
    return Path(source, where, mask=mask, held=held, held_on=window.sigma_end, remarks=remarks)


def features_of(model: Any, blend: BlendFeatures, prompt: list, chosen: str, callback: Any) -> tuple[host.Source, str]:
    """(where the source's features come from, a sentence). Raises ValueError where the window has no level."""
    if not host.source_levels(blend):
        raise ValueError(
            "no level of the trajectory lies between start_percent and end_percent: move them apart, or invert in "
            "more steps."
        )
    return host.chosen_source(
        model,
        blend,
        prompt,
        chosen,
        pictures=", or put the source prompt through the same conditioning node",
        smaller=", or blend fewer layers or levels",
        callback=callback,
    )
