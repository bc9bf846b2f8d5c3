"""Attention Fusion as the node asks for it: its settings, both prompts, and the model that fuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import host, inputs
from ..settings import Settings
from .fusion import TECHNIQUE, Fusion, attach_fusion
from .prompts import Prompts, read_prompts
from .recording import CROSS, SELF

FATEZERO_LAYERS = "all but the finest"


@dataclass(frozen=True)
class FusionSettings(Settings):
    """What is fused, where and for how long; see PalimpsestAttentionFusion for what each does to the picture."""

    source_text: str
    edit_text: str
    self_attention_until: float = 0.5
    cross_attention_until: float = 0.5
    blend_words: str = ""
    blend_threshold: float = 0.3
    new_words: str = "their own attention"
    emphasis: float = 1.0
    layers: str = FATEZERO_LAYERS
    fuse_negative: bool = False
    source_features: str = host.AUTO

    @property
    def until(self) -> dict[str, float]:
        """The kinds of attention that are fused, each with its share of the sampling."""
        wanted = {SELF: self.self_attention_until, CROSS: self.cross_attention_until}
        return {kind: share for kind, share in wanted.items() if share > 0}


@dataclass(frozen=True)
class Applied:
    """A model that fuses, the edit's prompt to sample with, and what a person should know of both."""

    model: Any
    positive: list
    report: str


def apply(
    model: Any,
    trajectory: host.Trajectory,
    clip: Any,
    settings: FusionSettings,
    *,
    mask: Tensor | None = None,
    callback: Any = None,
    remarks: host.Remarks | None = None,
) -> Applied:
    """A clone of the model that fuses. With both fractions 0 it is the model, bit for bit.

    callback hears of the recording, where there is one, remarks of sampling runs that do not go the trajectory's way.
    Raises ValueError for other architectures, unusable masks, and memory that is not there.
    """
    prompts = read_prompts(
        clip,
        settings.source_text,
        settings.edit_text,
        blend_words=settings.blend_words,
        new_words=settings.new_words,
        emphasis=settings.emphasis,
    )
    check(model, trajectory, mask)
    host.require_readable(model, [*prompts.source, *prompts.edit], "clip")
    note, patched = inputs.prompt_note(trajectory, prompts.source), model.clone()
    if not settings.until:
        return Applied(patched, prompts.edit, "both fractions are 0: nothing is fused" + note)
    fusion = fusion_of(model, trajectory, prompts, settings, mask)
    require_levels(fusion)
    source, how = host.chosen_source(
        model,
        fusion,
        prompts.source,
        settings.source_features,
        pictures="",
        smaller=", or layers to 'all but the finest'",
        callback=callback,
    )
    if remarks is not None:
        apart = "each step takes what was recorded at the nearest noise level"
        host.compare_runs(patched, host.Recorded.of(trajectory, apart), remarks)
    attach_fusion(patched, fusion, source)
    unlike = None if mask is None else host.stretched(mask, tuple(trajectory.latents.shape[-2:]))
    said = [prompts.report, *one_coloured(mask), *filter(None, [unlike]), how]
    return Applied(patched, prompts.edit, "; ".join(said) + note)


def one_coloured(mask: Tensor | None) -> list[str]:
    """What is to be said of a mask without a region."""
    colour = None if mask is None else host.one_colour(mask)
    if colour is None:
        return []
    effect = {
        "black": "the source's shapes stay everywhere: paint white where they may change, or disconnect it",
        "white": "self-attention is fused nowhere: paint black where the source's shapes stay",
    }[colour]
    return [f"the mask is {colour} all over, so that {effect}"]


def fitted_mask(mask: Tensor, trajectory: host.Trajectory) -> Tensor:
    """The part of a mask that the source's latents show, (1 or B, h, w)."""
    return host.as_encoded(mask.reshape(-1, *mask.shape[-2:]).float(), trajectory.latents.shape[-2:])


def check(model: Any, trajectory: host.Trajectory, mask: Tensor | None) -> None:
    """Raise ValueError for another architecture and for what is no mask."""
    host.require_unet(model, TECHNIQUE)
    way_out = "invert the picture with this model"
    inputs.require_same_layout(model, trajectory.layout, "the trajectory was recorded", way_out)
    if mask is not None:
        host.picture_rows(mask, mask.reshape(-1, *mask.shape[-2:]).shape[0], 1, 1)


def fusion_of(
    model: Any, trajectory: host.Trajectory, prompts: Prompts, settings: FusionSettings, mask: Tensor | None
) -> Fusion:
    """What is fused. Raises ValueError where the model has no layers of the chosen ones."""
    keys = frozenset(layer.key for layer in host.chosen_self_attention(model, settings.layers, TECHNIQUE))
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    return Fusion(
        trajectory=trajectory,
        prompts=prompts,
        layers={SELF: keys, CROSS: keys},
        above={kind: to_sigma(share) for kind, share in settings.until.items()},
        threshold=settings.blend_threshold,
        mask=None if mask is None else fitted_mask(mask, trajectory),
        negative=settings.fuse_negative,
    )


def require_levels(fusion: Fusion) -> None:
    """Raise ValueError where a kind of attention is fused at no level of the trajectory."""
    levels = host.source_levels(fusion)
    without = [kind for kind in fusion.above if not any(kind in fusion.kinds(sigma) for sigma in levels)]
    if without:
        raise ValueError(
            "no level of the trajectory lies within "
            f"{' and '.join(f'{kind}_attention_until' for kind in without)}: raise the fraction, or invert in more "
            "steps."
        )
