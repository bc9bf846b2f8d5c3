"""Attention fusion inside the host: while an edit is sampled, its attention is the source's where both prompts agree.

The source's queries and keys come from a pass of its own through the network, on its inverted latents and with its own
prompt (fusion_source). With them and the edit's values the host's attention gives what FateZero computes from stored
maps (kernels/attention_fusion.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels import attention_fusion as maths
from ...kernels.attention_map import indicator_values, mass_of_output
from .. import host
from ..feature_blend import blend as feature_blend
from ..host.areas import Area
from .prompts import Prompts

TECHNIQUE = "Attention Fusion"
PREFIX = "palimpsest_attention_fusion."
SELF, CROSS, MASK = "self", "cross", "mask"
MASK_GRID = 16 * 16  # the published code finds the mask in layers of 16 x 16 places

# What is kept of the source: (SELF or CROSS, layer, "query" or "key") -> (B, N or S, C); (MASK,) -> (B, h, w)
Pieces = Mapping[tuple, Tensor]

# ---- what is fused ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fusion:
    """What is fused, where and when. above: the kinds that act, each above this noise level; layers: where.

    mask (1 or B, h, w): white where the edit's own structure acts. Without it and without blend words in `prompts` the
    source's self-attention acts everywhere. negative: self-attention in the negative prompt's rows as well.
    """

    name: str
    reference: host.Trajectory
    prompts: Prompts
    layers: Mapping[str, frozenset[host.LayerKey]]
    above: Mapping[str, float]
    source: Source
    threshold: float = 0.3
    mask: Tensor | None = None
    negative: bool = False

    def kinds(self, sigma: float) -> frozenset[str]:
        """The kinds of attention that are fused at a noise level."""
        return frozenset(kind for kind, level in self.above.items() if sigma > level)


# ---- in a pass of the source -----------------------------------------------------------------------------------------


class Recording:
    """In a pass of the source: keep queries and keys, and where the blend words act."""

    def __init__(self, fusion: Fusion, sigma: float):
        self.fusion, self.kinds = fusion, fusion.kinds(sigma)
        self.kept: dict[tuple, Tensor] = {}
        self.mass: dict[tuple[int, int], list[Tensor]] = {}

    def self_attention(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """The layer's own attention."""
        self.keep(SELF, query, key, options)
        return attend(query, key, value)

    def cross_attention(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """The layer's own attention."""
        self.keep(CROSS, query, key, options)
        words = self.fusion.prompts.words
        if words is not None and self.fusion.mask is None and SELF in self.kinds:
            heads, grid = options["n_heads"], tuple(options["activations_shape"][-2:])
            shown = indicator_values([words.every_position], key.shape[1], heads, key.shape[-1] // heads).to(key)
            mass = mass_of_output(host.run_attention(options, None, query, key, shown.expand_as(key)), 1, heads)
            self.mass.setdefault(grid, []).append(mass[..., 0].unflatten(1, grid))
        return attend(query, key, value)

    def keep(self, kind: str, query: Tensor, key: Tensor, options: dict) -> None:
        """Note a layer's query and key. Raises ValueError where they are not those of whole pictures."""
        layer = host.layer_key(options)
        if kind not in self.kinds or layer not in self.fusion.layers[kind]:
            return
        if len(options["cond_or_uncond"]) != 1:
            raise ValueError(
                f"the source's prompt has {len(options['cond_or_uncond'])} parts that act at once: leave schedules off "
                "the text encoder."
            )
        whole_picture(query, options)
        self.kept[kind, layer, "query"], self.kept[kind, layer, "key"] = query.detach(), key.detach()

    def pieces(self) -> Pieces:
        """All that was kept. Raises ValueError if the source never ran."""
        if not self.kept:
            raise ValueError("the source's prompt does not act at every step: leave schedules off the text encoder.")
        if not self.mass:
            return self.kept
        grid = min(self.mass, key=lambda size: abs(math.log(size[0] * size[1] / MASK_GRID)))
        mass = torch.stack(self.mass[grid]).mean(0)
        return self.kept | {(MASK,): maths.blend_mask(mass, self.fusion.threshold)}


def whole_picture(query: Tensor, options: dict) -> None:
    """Raise ValueError where queries are not one for each place."""
    height, width = options["activations_shape"][-2:]
    if query.shape[1] != height * width:
        raise ValueError(
            f"Attention Fusion cannot tell which place is which: a layer of {width} x {height} places asks for "
            f"{query.shape[1]} here because another node merges or tiles them (ToMe, HyperTile): take it out."
        )


# ---- in a pass of the edit -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fusing:
    """Put the source's attention in place of the edit's, in the rows of the edit's prompt."""

    fusion: Fusion
    pieces: Pieces
    kinds: frozenset[str]
    run: Run

    def self_attention(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """s_fused V: the source's queries and keys with the edit's values; where the mask is white the edit's own."""
        rows = self.rows(SELF, query, options)
        if not rows:
            return attend(query, key, value)
        chunks, pictures = host.chunk_rows(options, len(query))
        grid, places = tuple(options["activations_shape"][-2:]), self.areas(options)

        def of_source(part: str, tensor: Tensor) -> Tensor:
            name = SELF, host.layer_key(options), part
            return torch.cat([
                self.fetch(name, own, places[chunk], grid) if chunk in rows else own
                for chunk, own in enumerate(tensor.chunk(chunks))
            ])  # fmt: skip

        out = attend(of_source("query", query), of_source("key", key), value)
        masks = self.masks(pictures, grid, places)
        if masks is None:
            return out
        free = torch.cat([mask if chunk in rows else torch.ones_like(mask) for chunk, mask in enumerate(masks)])
        return torch.lerp(out, attend(query, key, value), free.to(out))

    def cross_attention(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """(A_source link + A_edit own) V, without the maps; the other prompts' rows are left alone."""
        rows = self.rows(CROSS, query, options)
        if not rows:
            return attend(query, key, value)
        chunks, _ = host.chunk_rows(options, len(query))
        grid, places = tuple(options["activations_shape"][-2:]), self.areas(options)
        name, queries, values = (CROSS, host.layer_key(options)), query.chunk(chunks), list(value.chunk(chunks))
        (link, own), copies, found = self.weights(value), self.copies(key, options), {}
        for chunk, start in rows.items():
            linked = maths.linked_values(values[chunk][:, start : start + len(own)], link)
            asked = self.fetch((*name, "query"), queries[chunk], places[chunk], grid)
            keys = self.pieces[(*name, "key")].expand(len(asked), -1, -1).to(key)
            found[chunk] = host.run_attention(options, None, asked, keys, linked)
            share = own.new_ones(value.shape[1])
            for copy in copies[chunk]:
                share[copy + start : copy + start + len(own)] = own
            values[chunk] = values[chunk] * share[:, None]
        out = attend(query, key, torch.cat(values)).chunk(chunks)
        return torch.cat([part + found[chunk] if chunk in found else part for chunk, part in enumerate(out)])

    def rows(self, kind: str, query: Tensor, options: dict) -> dict[int, int]:
        """Chunks of rows in which a layer's attention is fused, each with the row where the edit's prompt begins."""
        call = host.call_of(options)
        if call is None or kind not in self.kinds or host.layer_key(options) not in self.fusion.layers[kind]:
            return {}
        starts = {chunk: self.run.offset(self.fusion, prompt) for chunk, prompt in enumerate(call.prompts)}
        if kind == SELF and self.fusion.negative:
            starts |= {chunk: 0 for chunk, prompt in enumerate(call.prompts) if prompt.negative}
        found = {chunk: start for chunk, start in starts.items() if start is not None}
        if found:
            whole_picture(query, options)
        return found

    def copies(self, key: Tensor, options: dict) -> list[range]:
        """Where the copies of each chunk's prompt begin: prompts of different lengths share a call, repeated.

        Raises ValueError where another node took tokens away.
        """
        lengths = [prompt.length for prompt in host.call_of(options).prompts]
        joined = math.lcm(*lengths)
        if joined > key.shape[1]:
            raise ValueError(
                f"a prompt of {joined} tokens reaches a layer as {key.shape[1]}: another node shortens the text that "
                "the model sees, and Attention Fusion cannot find words in the rest: take that node out."
            )
        return [range(0, joined, length) for length in lengths]

    def areas(self, options: dict) -> tuple[Area | None, ...]:
        """The area of each chunk of rows."""
        return host.call_of(options).areas

    def fetch(self, name: tuple, like: Tensor, area: Area | None, grid: tuple[int, int]) -> Tensor:
        """The source's queries or keys for the rows of one prompt (B, M, C), cropped as its area is.

        Keys may be those of several frames, one after another. Raises ValueError where they are not the edit's.
        """
        found = self.pieces[name].expand(len(like), -1, -1).to(like)
        if area is not None:
            whole = host.whole_grid(area, grid)
            frames = found.unflatten(1, (-1, whole[0] * whole[1]))
            found = frames[:, :, area.tokens(whole, *grid).to(found.device)].flatten(1, 2)
        if found.shape != like.shape:
            raise ValueError(
                f"a layer gave {found.shape[1]} tokens for the source and has {like.shape[1]} for the edit: another "
                "node changes them on the way; put it before this node, or take it out."
            )
        return found

    def masks(self, pictures: int, grid: tuple[int, int], places: tuple[Area | None, ...]) -> list[Tensor] | None:
        """For every chunk of rows the share of the edit's own self-attention, (B, N, 1); None where it is 0."""
        given = self.fusion.mask if self.fusion.mask is not None else self.pieces.get((MASK,))
        if given is None:
            return None
        name = (pictures, grid, places)
        if name not in self.run.grids:
            # the layers' mask is scaled to the nearest, as the published code does; a person's own is averaged
            scale = partial(nearest_rows, given) if self.fusion.mask is None else partial(averaged_rows, given)
            self.run.grids[name] = [scale(area, pictures, grid).flatten(1)[..., None] for area in places]
        return self.run.grids[name]

    def weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`link` and `own` on the device of a run, in its precision."""
        place, prompts = (like.dtype, like.device), self.fusion.prompts
        if place not in self.run.weights:
            self.run.weights[place] = prompts.link.to(like), prompts.own.to(like)
        return self.run.weights[place]


def averaged_rows(mask: Tensor, area: Area | None, pictures: int, grid: tuple[int, int]) -> Tensor:
    """A mask (1 or B, h, w), cropped, at a layer's grid: (B, 1, h, w)."""
    return host.picture_rows(mask if area is None else area.crop(mask), pictures, *grid, "mask")


def nearest_rows(mask: Tensor, area: Area | None, pictures: int, grid: tuple[int, int]) -> Tensor:
    """The same by the nearest cell."""
    mask = (mask if area is None else area.crop(mask))[:, None].float()
    return torch.nn.functional.interpolate(mask, size=grid, mode="nearest").expand(pictures, -1, -1, -1)


# ---- what the host calls ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusedSelfAttention:
    """attn1 replacement: records or fuses, as the step that its options hold."""

    name: str
    previous: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        attend, step = partial(host.run_attention, options, self.previous), options.get(self.name)
        return attend(query, key, value) if step is None else step.self_attention(attend, query, key, value, options)


@dataclass(frozen=True)
class FusedCrossAttention:
    """attn2 replacement: records or fuses, as the step that its options hold."""

    name: str
    previous: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        attend, step = partial(host.run_attention, options, self.previous), options.get(self.name)
        return attend(query, key, value) if step is None else step.cross_attention(attend, query, key, value, options)


# ---- one sampling run ------------------------------------------------------------------------------------------------


class Run(feature_blend.Run):
    """What one sampling run keeps: the source's prompt as the model takes it, the step in use, masks, places."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: Pieces = {}
        self.weights: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.offsets: dict[host.Prompt, int | None] = {}

    def offset(self, fusion: Fusion, prompt: host.Prompt) -> int | None:
        """Where the edit's prompt begins in a sampled one."""
        if prompt not in self.offsets:
            self.offsets[prompt] = fusion.prompts.offset(prompt.text)
        return self.offsets[prompt]

    def use(self, at: Any, pieces: Callable[[], Pieces]) -> Pieces:
        """The pieces of a level, made once while the level stays the same."""
        if self.at != at:
            self.pieces, self.grids = pieces(), {}
            self.at = at
        return self.pieces


class Source(Protocol):
    """Where a step's source pieces come from."""

    def begin(self, guider: Any, run: Run, noise: Tensor, latent: Tensor, denoise_mask: Any, seed: Any) -> None:
        """Prepare for a sampling run."""

    def at(self, call: feature_blend.Call, fusion: Fusion) -> Pieces:
        """The pieces at a call's noise level, on its device."""


@dataclass(frozen=True)
class StartRun:
    """OUTER_SAMPLE wrapper: fresh state for a sampling run, gone when it ends. Refuses one without the edit."""

    fusion: Fusion = field(repr=False)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        fusion, guider = self.fusion, executor.class_obj
        conds = itertools.chain.from_iterable(group or () for group in guider.conds.values())
        if all(fusion.prompts.offset(cond.get("cross_attn")) is None for cond in conds):
            raise ValueError(
                "no sampled prompt is the edit's of Attention Fusion: connect its positive output to the sampler "
                "(ControlNet, areas, Combine and Concat between are fine, Average is not), and put nodes that look "
                "at the source themselves (Invert Picture, Tune KV, Feature Blend) before this node."
            )
        options = guider.model_options.setdefault("transformer_options", {})
        options[fusion.name + ".run"] = Run()
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(fusion.name + ".run", None)


@dataclass(frozen=True)
class BeginSampling:
    """SAMPLER_SAMPLE wrapper: check the picture's size and prepare the source."""

    fusion: Fusion = field(repr=False)

    def __call__(
        self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor,
        latent_image: Any = None, denoise_mask: Any = None, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        fusion, run = self.fusion, extra_args["model_options"]["transformer_options"][self.fusion.name + ".run"]
        fusion.reference.check_batch(noise)
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        fusion.source.begin(guider, run, noise, latent, denoise_mask, extra_args.get("seed"))
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)


@dataclass(frozen=True)
class FuseStep:
    """PREDICT_NOISE wrapper: once per model call, fetch the source's pieces."""

    fusion: Fusion = field(repr=False)

    def __call__(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None, **kwargs
    ) -> Tensor:
        fusion, sigma = self.fusion, float(timestep.flatten()[0])
        kinds = fusion.kinds(sigma)
        if kinds:
            run = model_options["transformer_options"][fusion.name + ".run"]
            call = feature_blend.Call(executor.class_obj, x, timestep, sigma, model_options, run)
            model_options = call.options_with(
                **{fusion.name: Fusing(fusion, fusion.source.at(call, fusion), kinds, run)}
            )
        return executor(x, timestep, model_options, seed, **kwargs)


def replace_both(patched: Any, model: Any, fusion: Fusion) -> None:
    """Put the two replacements on a clone."""
    cross = [la for la in host.cross_attention_layers(model, TECHNIQUE) if la.key in fusion.layers[CROSS]]
    own = [la for la in host.self_attention_layers(model, TECHNIQUE) if la.key in fusion.layers[SELF]]
    host.replace_attention(patched, "attn1", own, partial(FusedSelfAttention, fusion.name))
    host.replace_attention(patched, "attn2", cross, partial(FusedCrossAttention, fusion.name))
    host.observe(patched)  # tells which rows are whose prompt


def install(model: Any, fusion: Fusion) -> Any:
    """A clone of the model that fuses."""
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    replace_both(patched, model, fusion)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, fusion.name, StartRun(fusion))
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, fusion.name, BeginSampling(fusion))
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, fusion.name, FuseStep(fusion))
    return patched
