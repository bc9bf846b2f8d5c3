"""Cross-attention inside the host: words masked by region, and recorders that look on, in one replacement a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.cross_attention_mask import biased_keys, fused
from .. import host
from ..words import ChosenWords, refuse_without_words, shortened
from .joint import attach_joint
from .regions import Region

NAME = "palimpsest_cross_attention"


# ---- what the masks of some regions are for a layer -----------------------------------------------------------------


@dataclass(frozen=True)
class LayerSize:
    """What the mask of a layer depends on: pictures, its grid, keys, and in what its attention is computed."""

    pictures: int
    height: int
    width: int
    keys: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, query: Tensor, key: Tensor, options: dict) -> LayerSize:
        """That of the layer which calls. Raises ValueError where its queries are not one for each place."""
        height, width = options["activations_shape"][-2:]
        _, pictures = host.chunk_rows(options, len(query))
        if height * width != query.shape[1]:
            raise ValueError(
                f"the mask of Cross-Attention Mask cannot find its place: a layer of {width} x {height} places asks "
                f"for {query.shape[1]} here because another node merges or tiles them: take that node out."
            )
        return cls(pictures, height, width, key.shape[1], host.attention_dtype(options, query), query.device)


@dataclass(frozen=True, eq=False)
class LayerMask:
    """What the attention of layers of one size needs in one kind of call; see biased_keys. zero: the number."""

    index: Tensor | None
    bias: Tensor
    zero: Tensor

    def attend(self, query: Tensor, key: Tensor, options: dict, value: Tensor) -> Tensor:
        """The layer's attention under the mask, for these values (R, M, C) -> (R, N, C)."""
        nothing = None
        if self.index is not None:
            nothing = self.zero.expand(len(value), len(self.index) - value.shape[1], value.shape[2])
        attend = partial(host.biased_attention, options)
        return fused(attend, query, key, value, index=self.index, bias=self.bias, nothing=nothing)


def layer_mask(regions: tuple[Region, ...], call: host.ModelCall, size: LayerSize) -> LayerMask | None:
    """What regions make of layers of one size; None where nothing is masked.

    Raises ValueError where another node took tokens away.
    """
    masked = [region.tokens(call, size.keys) for region in regions]
    tokens = sorted({token for rows in masked for row in rows for token in row})
    if not tokens:
        return None
    if tokens[-1] >= size.keys:
        raise shortened(call, size.keys)
    before, after = token_weights(regions, masked, tokens, call, size)
    if bool((before == 1).all()) and bool((after == 1).all()):
        return None
    index, bias = biased_keys(before, after, tokens, size.keys)
    bias = bias.to(size.device, size.dtype).expand(-1, size.pictures, -1, -1).flatten(0, 1)[:, None]
    zero = torch.zeros((), device=size.device, dtype=size.dtype)
    return LayerMask(None if index is None else index.to(size.device), bias, zero)


def token_weights(
    regions: tuple[Region, ...], masked: list[list[set[int]]], tokens: list[int], call: host.ModelCall, size: LayerSize
) -> tuple[Tensor, Tensor]:
    """Weights before and after the softmax, (chunks, pictures or 1, N, tokens): the regions' multiplied.

    masked: by region and chunk, which tokens it acts on.
    """
    pictures = max(min(len(region.mask), size.pictures) for region in regions)
    before = torch.ones(call.chunks, pictures, size.height * size.width, len(tokens))
    after = torch.ones_like(before)
    for region, rows in zip(regions, masked, strict=True):
        target = before if region.mode.renormalise else after
        for chunk, (row, area) in enumerate(zip(rows, call.areas, strict=True)):
            columns = [column for column, token in enumerate(tokens) if token in row]
            whole = call.latent if area is None else area.whole
            region.look_at(call, whole)
            weights = region.weights(area, size.pictures, size.height, size.width, whole=whole, frames=call.frames)
            target[chunk, ..., columns] *= weights[..., None].cpu()
    return before, after


# ---- what the host calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossAttention:
    """attn2 replacement: the layer's attention with words masked by region; recorders are shown it.

    Every Cross-Attention Mask adds a region; where several act on a word at a place, their weights are multiplied.
    Without a region in force this is the host's own attention, bit for bit.

    recorders: called as recorder(attend, query, key, options), where attend(value) is this attention for any other
    values (R, M, C) -> (R, N, C): an indicator of some tokens as value gives the share they have of each query.

    previous: another node's replacement that was here before. Under a mask the result is
    previous(Q, K, V) + masked(Q, K, V) - plain(Q, K, V): exact for those that add to the plain attention, as image
    prompts do (IP-Adapter).
    """

    regions: tuple[Region, ...] = ()
    recorders: tuple[Callable, ...] = ()
    previous: Any = None

    @host.not_compiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        mask = self.mask(query, key, options)
        plain = partial(host.run_attention, options, None, query, key)
        attend = plain if mask is None else partial(mask.attend, query, key, options)
        for recorder in self.recorders:
            recorder(attend, query, key, options)
        if self.previous is None:
            return attend(value)
        earlier = self.previous(query, key, value, options)
        return earlier if mask is None else earlier + attend(value) - plain(value)

    def mask(self, query: Tensor, key: Tensor, options: dict) -> LayerMask | None:
        """What the regions in force make of this layer, once a run for every size and kind of call."""
        call, layer = host.call_of(options), host.layer_key(options)
        if call is None or None in call.prompts:
            return None
        active = tuple(region for region in self.regions if layer in region.layers and call.within(region.window))
        if not active:
            return None
        size = LayerSize.of(query, key, options)
        frames = call.frames if any(len(region.mask) > 1 for region in active) else None
        name = (NAME, tuple(region.name for region in active), call.prompts, call.areas, frames, size)
        return call.run.kept(name, lambda: layer_mask(active, call, size))


@dataclass(frozen=True)
class RequireWords:
    """At the start of a run: refuse to sample where no prompt holds the chosen words.

    Nodes that look at the source by its own prompt run without them.
    """

    words: ChosenWords = field(repr=False)
    technique: str
    source: str

    def __call__(self, guider: Any, run: host.Run) -> None:
        if guider.model_options.get("transformer_options", {}).get(host.OF_A_NODE):
            return
        refuse_without_words(run.every_cond, "Cross-Attention Mask")
        if not self.words.among(run.every_cond):
            raise ValueError(
                f"the words {self.words.quoted} of {self.technique} are in no prompt that is sampled: theirs was "
                f"averaged, or encoded by another CLIP or LoRA. Connect the positive output of {self.source} to the "
                "sampler; combining, concatenating and areas are fine."
            )


def attach(
    patched: Any,
    layers: list[host.AttentionLayer],
    regions: tuple[Region, ...] = (),
    recorders: tuple[Callable, ...] = (),
) -> None:
    """Add regions or recorders to the cross-attention of some layers of a clone, behind those that are there.

    Of a transformer to all its joint attention: there regions and recorders look themselves which layer it is.
    """

    def attention(earlier: Any) -> CrossAttention:
        ours = earlier if isinstance(earlier, CrossAttention) else CrossAttention(previous=earlier)
        return replace(ours, regions=ours.regions + regions, recorders=ours.recorders + recorders)

    host.observe(patched)
    family = host.family_of(patched)
    if family is None:
        host.replace_attention(patched, "attn2", layers, attention)
    else:
        attach_joint(patched, family, regions, recorders)
    for region in (region for region in regions if region.words is not None):
        host.each_run(patched, region.name, RequireWords(region.words, region.technique, region.source))
