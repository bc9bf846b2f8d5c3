"""Feature blending inside the host: while an edit is sampled, the source's features flow back into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import feature_blend as maths
from .. import host
from .layers import AFTER_MIDDLE, MIDDLE, Feature, FeatureLayer, blendable
from .patches import patch_features
from .path import Followed, Path

Alpha = tuple[Tensor | float, Tensor | float]  # the edit's share inside and outside of the mask


# ---- what the patches do with a feature -----------------------------------------------------------------------------


class Recording:
    """In a pass of the source: keep the wanted features."""

    def __init__(self, wanted: frozenset[Feature]):
        self.wanted = wanted
        self.features: dict[Feature, Tensor] = {}

    def meet(self, key: Feature, h: Tensor, options: dict) -> Tensor:
        """h (B, C, h, w) unchanged. Raises ValueError where the source's prompt is more than one."""
        if key in self.wanted:
            if len(options["cond_or_uncond"]) != 1:
                raise ValueError(
                    f"the source prompt has {len(options['cond_or_uncond'])} parts that act at once: connect one "
                    "prompt that describes the whole picture."
                )
            self.features[key] = h.detach().clone()  # others may change h in place
        return h

    def pieces(self) -> host.Pieces:
        """The features by their names. Raises ValueError if the source never ran."""
        if not self.features:
            raise ValueError("the source prompt does not act at every step: connect it without a time range.")
        return self.features


@dataclass(frozen=True)
class Blending:
    """In a pass of the edit: blend the source's features in, in cond and uncond rows alike.

    features: the source's, (B or 1, C, h, w), of a clip (B or 1, C, F, h, w). sources: which of them each blended
    feature is mixed with. mask (pictures or F, h, w) of any size; weights: what was made of it, kept over a run.
    """

    features: Mapping[Feature, Tensor]
    sources: Mapping[Feature, Feature]
    alphas: Mapping[Feature, Alpha]
    mask: Tensor | None = None
    weights: dict[tuple, Tensor] = field(default_factory=dict)

    def meet(self, key: Feature, h: Tensor, options: dict) -> Tensor:
        """h (R, C, h, w) or (R, C, F, h, w), blended if this feature was chosen."""
        if key not in self.alphas:
            return h
        chunks, pictures = host.chunk_rows(options, len(h))
        rows, areas, frames = h.unflatten(0, (chunks, pictures)), areas_of(options), host.frames_of(options)
        feature = frames.rows(self.features[self.sources[key]])
        source = joined([crop(feature, area, h.shape[-2:]) for area in areas])
        if source.shape[2:] != rows.shape[2:]:
            raise ValueError(
                f"the source's feature {' '.join(map(str, key))} is {tuple(source.shape[2:])}, the edit's "
                f"{tuple(rows.shape[2:])}: another node resizes features in one of the two (a downscale patch?); put "
                "it before this node, or set source_features to 'same step'."
            )
        weights = [self.weight(key, area, frames, pictures, h) for area in areas]
        weight = weights[0] if self.mask is None else joined(weights)
        return maths.blend(rows, source.to(h), weight).flatten(0, 1)

    def weight(
        self, key: Feature, area: host.Area | None, frames: host.Frames, pictures: int, like: Tensor
    ) -> Tensor | float:
        """The edit's share of a feature or of a crop of it, a number, (pictures, 1, h, w) or (1, 1, F, h, w); made once
        a run."""
        if self.mask is None:
            return maths.blend_weight(None, *self.alphas[key])
        name = (key, area, frames if len(self.mask) > 1 else None, pictures, like.shape[2:], like.dtype, like.device)
        if name not in self.weights:
            mask = self.mask if area is None else area.crop(self.mask)
            if like.ndim == 5:
                small = host.rows_on(mask, like)
            else:
                small = host.rows_of_frames(mask, frames, pictures, *like.shape[2:])
            self.weights[name] = maths.blend_weight(small, *self.alphas[key]).to(like)
        return self.weights[name]


def areas_of(options: dict) -> tuple[host.Area | None, ...]:
    """One area for each chunk of rows, or one None for all of them."""
    call = host.call_of(options)
    return call.areas if call is not None and call.has_areas else (None,)


def joined(parts: list[Tensor]) -> Tensor:
    """One tensor for all chunks of rows, or one for each, with a dimension of chunks in front."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def crop(feature: Tensor, area: host.Area | None, size: tuple[int, int]) -> Tensor:
    """The part of a whole picture's feature (B, C, H, W) that a prompt's area of `size` features covers."""
    if area is None:
        return feature
    (height, width), (rows, columns) = feature.shape[-2:], size
    top = min(round(area.top * height / area.whole[0]), height - rows)
    left = min(round(area.left * width / area.whole[1]), width - columns)
    return feature[..., top : top + rows, left : left + columns]


# ---- what is wanted of the source -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlendFeatures:
    """What is blended with what, and when; host.reference.Wanted. alphas and sources are keyed by the blended features.

    Without alphas nothing is. mask (1 or B, h, w), of a clip (1 or F, h, w): white where the first of two alphas acts.
    path: what is looked at, whether the latent lies where the source's features mean anything; without it they act on
    any.
    """

    trajectory: host.Trajectory
    alphas: Mapping[Feature, Alpha]
    sources: Mapping[Feature, Feature]
    window: host.Window
    mask: Tensor | None = None
    path: Path | None = None
    name: str = field(default_factory=lambda: host.source_name("feature_blend"))

    def kinds(self, sigma: float) -> frozenset[Feature]:
        """The source's features that are blended in at a noise level."""
        return frozenset(self.sources.values() if self.alphas and sigma in self.window else ())

    def numbers(self, model: Any, sigma: float) -> int:
        """Numbers in those features of a picture, or of a clip."""
        size, kept = self.trajectory.latents.shape[-2:], self.kinds(sigma)
        return self.trajectory.frames * sum(layer.elements(*size) for layer in blendable(model) if layer.key in kept)

    def patch(self, patched: Any) -> None:
        """Meet features on a clone."""
        patch_features(patched, self.name, {*self.alphas, *self.sources.values()})

    def recorder(self, sigma: float) -> Recording:
        """For a pass of the source."""
        return Recording(self.kinds(sigma))

    def follows(self, x: Tensor, sigma: float, run: host.Run) -> bool:
        """Whether the latent lies on the source's path anywhere that features act.

        Raises ValueError for a clip of another number of frames.
        """
        self.trajectory.check_frames(x)
        return self.path is None or self.path.left(x, sigma, run) != self.path.where

    def acting(self, sigma: float, pieces: host.Pieces, run: host.Run) -> Blending:
        """For a pass of the edit."""
        left = frozenset() if self.path is None else run.kept(self.path.name, Followed).left
        alphas = self.alphas if self.path is None else self.path.alphas(self.alphas, left)
        return Blending(pieces, self.sources, alphas, self.mask, run.kept((self.name, "weights", left), dict))


def sources_of(layers: list[FeatureLayer], released_code: bool) -> dict[Feature, Feature]:
    """Which feature of the source each feature is blended with: itself.

    released_code: PFB-Diff's blends what the middle block returned into what it is given.
    """
    found = {layer.key: layer.key for layer in layers}
    return found | {MIDDLE: AFTER_MIDDLE} if released_code and MIDDLE in found else found
