"""The reference's features, recorded over a whole trajectory before sampling and streamed to each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import host
from .blend import PREFIX, BlendFeatures, Call, Recording, Run, install, source
from .layers import Feature, FeatureLayer

# Share of the free memory that recorded features may take where this is left to the node.
SHARE = 0.25


@dataclass(frozen=True)
class Cached:
    """Recorded features: levels descending; pieces[i] (B, P) on the CPU, all features of level i in one piece.

    shapes: (C, h, w) of each feature in the order in which a piece holds them.
    """

    levels: tuple[float, ...]
    pieces: tuple[Tensor, ...]
    shapes: Mapping[Feature, tuple[int, int, int]]

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(piece.numel() * piece.element_size() for piece in self.pieces)

    def begin(self, guider: Any, run: Run, noise: Tensor, latent: Tensor, denoise_mask: Any, seed: Any) -> None:
        """Nothing to prepare."""

    def at(self, call: Call, blend: BlendFeatures) -> Mapping[Feature, Tensor]:
        """The features recorded at the nearest level; those of the one after it begin their way to the device."""
        index, run = host.nearest_level(self.levels, call.sigma), call.run
        if run.at != index:
            coming = {index + 1: self.pieces[index + 1]} if index + 1 < len(self.pieces) else {}
            piece = run.stream.fetch({index: self.pieces[index]}, coming, call.x.device)[index]
            run.at, run.features = index, self.unpack(piece)
        return run.features

    def unpack(self, piece: Tensor) -> dict[Feature, Tensor]:
        """Views (B, C, h, w) of one piece (B, P)."""
        parts = piece.split([c * h * w for c, h, w in self.shapes.values()], 1)
        return {key: part.unflatten(1, shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}


class RecordFeatures:
    """A host sampler function: run the reference at each of its levels and keep what the patches recorded."""

    def __init__(self, blend: BlendFeatures, levels: tuple[float, ...]):
        self.blend, self.levels, self.recording = blend, levels, Recording(frozenset(blend.sources.values()))
        self.shapes: dict[Feature, tuple[int, int, int]] = {}
        self.pieces: list[Tensor] = []

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x (B, C, H, W) gives device and dtype and is returned unchanged: the result is in `pieces` and `shapes`."""
        import comfy.model_management

        options = extra_args["model_options"]["transformer_options"] | {self.blend.name: self.recording}
        extra_args = extra_args | {"model_options": extra_args["model_options"] | {"transformer_options": options}}
        for i, sigma in enumerate(self.levels):
            comfy.model_management.throw_exception_if_processing_interrupted()
            here = host.latents_at(self.blend.reference, sigma).to(x)
            denoised = model(here, here.new_full((len(here),), sigma), **extra_args)
            features = self.recording.features
            self.shapes = {key: tuple(feature.shape[1:]) for key, feature in features.items()}
            self.pieces.append(torch.cat([feature.flatten(1) for feature in features.values()], 1).cpu())
            self.recording.features = {}
            if callback is not None:
                callback({"i": i, "x": here, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return x


def record(model: Any, blend: BlendFeatures, prompt: list, callback: Any = None) -> Cached:
    """Run the reference through the model at every level of `blend.window`; the model is left as it was.

    callback(step, denoised, x, steps) as the host's samplers call it. Takes one row of the network a level and picture.
    """
    levels = levels_in(blend)
    plain = without_blending(model)
    function = RecordFeatures(blend, levels)
    patched = install(plain, replace(blend, alphas={}, pinned_above=math.inf, quirks=False))
    start = model.model.process_latent_out(blend.reference.latents[0].clone())
    steps = torch.tensor([*levels, 0.0])
    host.sample(patched, function, start, sigmas=steps, positive=source(prompt), callback=callback)
    return Cached(levels, tuple(function.pieces), function.shapes)


def levels_in(blend: BlendFeatures) -> tuple[float, ...]:
    """The reference's levels at which features are blended. Raises ValueError where there are none."""
    levels = tuple(s for s in blend.reference.sigmas if s > 0 and blend.window[1] < s <= blend.window[0])
    if not levels:
        raise ValueError(
            "no level of the trajectory lies between start_percent and end_percent: move them apart, or invert in "
            "more steps."
        )
    return levels


def without_blending(model: Any) -> Any:
    """A clone of the model on which other Feature Blends do not act: their wrappers leave nothing in the options."""
    plain = model.clone()
    for kind, named in list(plain.wrappers.items()):
        for name in [name for name in named if name.startswith(PREFIX)]:
            plain.remove_wrappers_with_key(kind, name)
    return plain


def expected_bytes(blend: BlendFeatures, layers: list[FeatureLayer], dtype: torch.dtype) -> int:
    """Memory that recording these features takes, before anything runs."""
    pictures, _, height, width = blend.reference.latents.shape[1:]
    kept = set(blend.sources.values())
    numbers = sum(layer.elements(height, width) for layer in layers if layer.key in kept)
    return numbers * pictures * len(levels_in(blend)) * torch.empty(0, dtype=dtype).element_size()


def free_memory() -> int:
    """Bytes of ordinary memory that are free."""
    import comfy.model_management

    return int(comfy.model_management.get_free_memory(torch.device("cpu")))
