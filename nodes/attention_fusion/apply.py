"""Attention Fusion as the node asks for it: its settings, and where the source's attention comes from."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .. import host
from ..feature_blend import cache as feature_cache
from .fusion import CROSS, PREFIX, SELF, TECHNIQUE, Fusion, install
from .prompts import Prompts
from .source import SameStep, expected_bytes, levels_in, record

AUTO, CACHED, SAME_STEP = "auto", "cached", "same step"
SOURCES = (AUTO, CACHED, SAME_STEP)


@dataclass(frozen=True)
class FusionSettings:
    """What is fused, where and for how long; see PalimpsestAttentionFusion for what each does to the picture."""

    self_until: float = 0.5
    cross_until: float = 0.5
    threshold: float = 0.3
    layers: str = "all"
    negative: bool = False
    source_maps: str = AUTO


def apply(
    model: Any,
    trajectory: host.Trajectory,
    prompts: Prompts,
    settings: FusionSettings,
    mask: Tensor | None = None,
    callback: Any = None,
) -> tuple[Any, str]:
    """(a clone of the model that fuses, a sentence on it). With both fractions 0 it is the model, bit for bit.

    callback hears of the recording, where there is one. Raises ValueError for other architectures, unusable masks, and
    memory that is not there.
    """
    host.require_unet(model, TECHNIQUE)
    if trajectory.layout != host.layout_fingerprint(model):
        raise ValueError(
            "the trajectory was recorded with another model architecture: invert the picture with this model."
        )
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[-2:]).float()
        host.picture_rows(mask, len(mask), 1, 1)  # refuses what is no mask
    until = {kind: value for kind, value in ((SELF, settings.self_until), (CROSS, settings.cross_until)) if value > 0}
    if not until:
        return model.clone(), "both fractions are 0: nothing is fused"
    keys = frozenset(layer.key for layer in host.chosen_self_attention(model, settings.layers, TECHNIQUE))
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    fusion = Fusion(
        name=PREFIX + uuid.uuid4().hex,
        reference=trajectory,
        prompts=prompts,
        layers={SELF: keys, CROSS: keys},
        above={kind: to_sigma(value) for kind, value in until.items()},
        source=SameStep(prompts.source),
        threshold=settings.threshold,
        mask=mask,
        negative=settings.negative,
    )
    fusion, how = with_source(model, fusion, settings.source_maps, callback)
    return install(model, fusion), f"{prompts.report}; {how}"


def with_source(model: Any, fusion: Fusion, wanted: str, callback: Any = None) -> tuple[Fusion, str]:
    """(fusion, a sentence): recorded where asked for, or where it fits into a quarter of the free memory.

    Raises ValueError where it was asked for and does not fit, or needs pictures that only the edit's prompt has.
    """
    with_pictures = model.model.diffusion_model.in_channels > model.get_model_object("latent_format").latent_channels
    if wanted == CACHED and with_pictures:
        raise ValueError(
            "source_maps 'cached' cannot serve an inpaint or instruct model, whose pictures come with the edit's "
            "prompt: set source_maps to 'same step'."
        )
    needed, free, levels = expected_bytes(model, fusion), feature_cache.free_memory(), len(levels_in(fusion))
    if wanted == CACHED and needed > free:
        raise ValueError(
            f"source_maps 'cached' needs {needed / 1e9:.1f} GB ({levels} levels), {free / 1e9:.1f} GB of memory are "
            "free: set source_maps to 'same step', or layers to 'all but the finest'."
        )
    if wanted == CACHED or (wanted == AUTO and not with_pictures and needed <= feature_cache.SHARE * free):
        cached = record(model, fusion, callback)
        size = f"{levels} levels, {cached.bytes / 1e6:.1f} MB of ordinary memory"
        return replace(fusion, source=cached), f"source recorded ({size}), no further cost a step"
    return fusion, (
        f"source runs beside each of {levels} steps: one more row; recorded it would take {needed / 1e6:.1f} MB"
    )
