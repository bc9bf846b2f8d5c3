"""Where the source's queries and keys come from: recorded over its trajectory, or made beside every step.

Recorded, it lies in ordinary memory, one piece a level, and two levels at a time go to the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..feature_blend import blend as feature_blend
from ..host.streaming import PieceStream
from .fusion import CROSS, PREFIX, SELF, Fusion, Pieces, Recording, Run, replace_both

OURS = (PREFIX, feature_blend.PREFIX)  # what must not act in a pass of the source


class SameStep(feature_blend.SameStep):
    """A pass of the source before every step of the edit that is fused: one more row, and one step's pieces."""

    def at(self, call: feature_blend.Call, fusion: Fusion) -> Pieces:
        """Run the source; a sampler that asks twice at one level has it once."""
        return call.run.use(call.sigma, partial(self.record, call, fusion))

    def record(self, call: feature_blend.Call, fusion: Fusion) -> Pieces:
        """One pass on the trajectory's latents. Other nodes' blending and fusing stay out of it."""
        import comfy.samplers

        recording = Recording(fusion, call.sigma)
        x = host.latents_at(fusion.reference, call.sigma).to(call.x)
        options = call.options_with(**{fusion.name: recording})
        others = options["transformer_options"]
        for name in [name for name in others if name.startswith(OURS) and name != fusion.name]:
            del others[name]
        with torch.no_grad():
            level = call.timestep[:1].expand(len(x))
            comfy.samplers.calc_cond_batch(call.guider.inner_model, [call.run.prompt], x, level, options)
        return recording.pieces()


@dataclass(frozen=True, eq=False)
class Cached:
    """Recorded pieces: levels descending; pieces[i] (B, P) on the CPU is all of level i, in the order of shapes[i]."""

    levels: tuple[float, ...]
    pieces: tuple[Tensor, ...]
    shapes: tuple[Mapping[tuple, tuple[int, ...]], ...]

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(piece.nbytes for piece in self.pieces)

    def begin(self, guider: Any, run: Run, noise: Tensor, latent: Tensor, denoise_mask: Any, seed: Any) -> None:
        """Nothing to prepare."""

    def at(self, call: feature_blend.Call, fusion: Fusion) -> Pieces:
        """The pieces recorded nearest to the level; those of the next begin their way to the device.

        Near the end of one kind of attention, the nearest level may have been recorded without it.
        """
        kinds = fusion.kinds(call.sigma)
        index = host.nearest_level(tuple(level for level in self.levels if kinds <= fusion.kinds(level)), call.sigma)
        return call.run.use(index, partial(self.fetch, index, call.run.stream, call.x.device))

    def fetch(self, index: int, stream: PieceStream, device: torch.device) -> Pieces:
        """Views of one level's piece."""
        coming = {index + 1: self.pieces[index + 1]} if index + 1 < len(self.pieces) else {}
        piece = stream.fetch({index: self.pieces[index]}, coming, device)[index]
        parts = piece.split([math.prod(shape) for shape in self.shapes[index].values()], 1)
        return {
            name: part.unflatten(1, shape)
            for (name, shape), part in zip(self.shapes[index].items(), parts, strict=True)
        }


class RecordLevels:
    """A host sampler function: run the source at some levels and keep what was recorded."""

    def __init__(self, fusion: Fusion, levels: tuple[float, ...]):
        self.fusion, self.levels = fusion, levels
        self.pieces: list[Tensor] = []
        self.shapes: list[dict[tuple, tuple[int, ...]]] = []

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x (B, C, H, W) gives device and dtype and is returned unchanged: the result is in `pieces` and `shapes`."""
        for i, sigma in enumerate(self.levels):
            recording = Recording(self.fusion, sigma)
            options = extra_args["model_options"]
            options = options | {"transformer_options": options["transformer_options"] | {self.fusion.name: recording}}
            here = host.latents_at(self.fusion.reference, sigma).to(x)
            denoised = model(here, here.new_full((len(here),), sigma), **extra_args | {"model_options": options})
            found = recording.pieces()
            first = next(iter(found.values()))
            self.shapes.append({name: tuple(piece.shape[1:]) for name, piece in found.items()})
            self.pieces.append(torch.cat([piece.to(first).flatten(1) for piece in found.values()], 1).cpu())
            if callback is not None:
                callback({"i": i, "x": here, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return x


def record(model: Any, fusion: Fusion, callback: Any = None) -> Cached:
    """Run the source through the model at every level of its trajectory at which something is fused.

    The model is left as it was. callback(step, denoised, x, steps) as the host's samplers call it.
    """
    levels = levels_in(fusion)
    function, patched = RecordLevels(fusion, levels), model.clone()
    for kind, by_name in list(patched.wrappers.items()):
        for name in [name for name in by_name if name.startswith(OURS)]:
            patched.remove_wrappers_with_key(kind, name)
    replace_both(patched, model, fusion)
    start = model.model.process_latent_out(fusion.reference.latents[0].clone())
    steps = torch.tensor([*levels, 0.0])
    host.sample(patched, function, start, sigmas=steps, positive=fusion.prompts.source, callback=callback)
    return Cached(levels, tuple(function.pieces), tuple(function.shapes))


def levels_in(fusion: Fusion) -> tuple[float, ...]:
    """The trajectory's levels at which something is fused. Raises ValueError where a kind of attention has none."""
    levels = tuple(sigma for sigma in fusion.reference.sigmas if sigma > 0 and fusion.kinds(sigma))
    without = [kind for kind in fusion.above if not any(kind in fusion.kinds(sigma) for sigma in levels)]
    if without:
        raise ValueError(
            f"no level of the trajectory lies within {' and '.join(f'{kind}_until' for kind in without)}: raise the "
            "fraction, or invert in more steps."
        )
    return levels


def expected_bytes(model: Any, fusion: Fusion) -> int:
    """Memory that recording takes, before anything runs."""
    pictures, _, height, width = fusion.reference.latents.shape[1:]
    tokens = len(fusion.prompts.link)
    numbers = {SELF: 0, CROSS: 0}
    for place in host.places(model):
        places, channels = math.ceil(height / place.scale) * math.ceil(width / place.scale), place.layer.channels
        numbers[SELF] += 2 * places * channels * (place.layer.key in fusion.layers[SELF])
        numbers[CROSS] += (places + tokens) * channels * (place.layer.key in fusion.layers[CROSS])
    total = sum(numbers[kind] for sigma in levels_in(fusion) for kind in fusion.kinds(sigma))
    return total * pictures * torch.empty(0, dtype=model.model.get_dtype_inference()).element_size()
