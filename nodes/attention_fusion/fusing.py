"""In a pass of the edit: the source's attention in place of the edit's, in the rows of the edit's prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import attention_fusion as maths
from .. import host
from .recording import CROSS, MASK, SELF, require_whole_picture

if TYPE_CHECKING:
    from .fusion import Fusion


class FusionRun:
    """What one sampling run keeps: where the edit's prompt begins in sampled ones, `link` and `own` on a device."""

    def __init__(self) -> None:
        self.offsets: dict[host.Prompt, int | None] = {}
        self.weights: dict[tuple, tuple[Tensor, Tensor]] = {}


@dataclass(frozen=True, eq=False)
class Fusing:
    """What layers do in one model call. pieces: the source's; kinds: those that are fused at its noise level."""

    fusion: Fusion
    pieces: host.Pieces
    kinds: frozenset[str]
    run: FusionRun
    masks: dict[tuple, list[Tensor]] = field(default_factory=dict)

    def self_attention(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """s_fused V: the source's queries and keys with the edit's values; where the mask is white the edit's own."""
        rows = self.rows(SELF, query, options)
        if not rows:
            return attend(query, key, value)
        chunks, pictures = host.chunk_rows(options, len(query))
        grid, call = tuple(options["activations_shape"][-2:]), host.call_of(options)
        areas = call.areas
        if call.frames.shown is not None and key.shape[1] != query.shape[1]:
            raise ValueError(
                "in the host's context windows a frame of the edit looks at other frames than one of the source: put "
                "Video Attention, or what else joins frames on this model, before this node, or take Context Windows "
                "out."
            )

        def of_source(part: str, tensor: Tensor) -> Tensor:
            name = SELF, host.layer_key(options), part
            own = tensor.chunk(chunks)
            return torch.cat([self.fetch(name, own[i], call, i, grid) if i in rows else own[i] for i in range(chunks)])

        out = attend(of_source("query", query), of_source("key", key), value)
        masks = self.free(pictures, grid, areas, call.frames)
        if masks is None:
            return out
        free = torch.cat([mask if chunk in rows else torch.ones_like(mask) for chunk, mask in enumerate(masks)])
        return torch.lerp(out, attend(query, key, value), free.to(out))

    def cross_attention(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """(A_source link + A_edit own) V, without the maps; the other prompts' rows are left alone."""
        rows = self.rows(CROSS, query, options)
        if not rows:
            return attend(query, key, value)
        queries, values = (list(t.chunk(host.call_of(options).chunks)) for t in (query, value))
        (link, own), copies, found = self.weights(value), copies_of_prompts(key, options), {}
        for chunk, start in rows.items():
            linked = maths.linked_values(values[chunk][:, start : start + len(own)], link)
            found[chunk] = self.from_source(chunk, queries[chunk], linked, options)
            share = own.new_ones(value.shape[1])
            for copy in copies[chunk]:
                share[copy + start : copy + start + len(own)] = own
            values[chunk] = values[chunk] * share[:, None]
        out = attend(query, key, torch.cat(values)).chunk(len(values))
        return torch.cat([part + found[chunk] if chunk in found else part for chunk, part in enumerate(out)])

    def from_source(self, chunk: int, query: Tensor, linked: Tensor, options: dict) -> Tensor:
        """A_source U for one chunk of rows, with the edit's linked values U."""
        grid, call = tuple(options["activations_shape"][-2:]), host.call_of(options)
        name = CROSS, host.layer_key(options)
        asked = self.fetch((*name, "query"), query, call, chunk, grid)
        keys = call.frames.rows(self.pieces[(*name, "key")]).expand(len(asked), -1, -1).to(query)
        return host.run_attention(options, None, asked, keys, linked)

    def rows(self, kind: str, query: Tensor, options: dict) -> dict[int, int]:
        """Chunks of rows in which a layer's attention is fused, each with the row where the edit's prompt begins."""
        call = host.call_of(options)
        if call is None or kind not in self.kinds or host.layer_key(options) not in self.fusion.layers[kind]:
            return {}
        starts = {chunk: self.offset(prompt) for chunk, prompt in enumerate(call.prompts)}
        if kind == SELF and self.fusion.negative:
            starts |= {chunk: 0 for chunk, prompt in enumerate(call.prompts) if prompt is not None and prompt.negative}
        found = {chunk: start for chunk, start in starts.items() if start is not None}
        if found:
            require_whole_picture(query, options)
        return found

    def offset(self, prompt: host.Prompt | None) -> int | None:
        """Where the edit's prompt begins in a sampled one."""
        if prompt is None:
            return None
        if prompt not in self.run.offsets:
            self.run.offsets[prompt] = self.fusion.prompts.offset(prompt.text)
        return self.run.offsets[prompt]

    def fetch(self, name: tuple, like: Tensor, call: host.ModelCall, chunk: int, grid: host.Grid) -> Tensor:
        """The source's queries or keys for the rows of one prompt (B, M, C), cropped as its area is.

        Keys may be those of several frames, one after another. Raises ValueError where they are not the edit's.
        """
        area = call.areas[chunk]
        found = call.frames.rows(self.pieces[name]).expand(len(like), -1, -1).to(like)
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

    def free(
        self, pictures: int, grid: host.Grid, areas: tuple[host.Area | None, ...], frames: host.Frames
    ) -> list[Tensor] | None:
        """For every chunk of rows the share of the edit's own self-attention, (B, N, 1); None where it is 0."""
        given = self.fusion.mask if self.fusion.mask is not None else self.pieces.get((MASK,))
        if given is None:
            return None
        name = (pictures, grid, areas, frames)
        if name not in self.masks:
            # the layers' mask is scaled to the nearest, as the published code does; a person's own is averaged
            scale = partial(nearest_rows if self.fusion.mask is None else averaged_rows, given, frames)
            self.masks[name] = [scale(area, pictures, grid).flatten(1)[..., None] for area in areas]
        return self.masks[name]

    def weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`link` and `own` on the device of a run, in its precision."""
        place, prompts = (like.dtype, like.device), self.fusion.prompts
        if place not in self.run.weights:
            self.run.weights[place] = prompts.link.to(like), prompts.own.to(like)
        return self.run.weights[place]


def copies_of_prompts(key: Tensor, options: dict) -> list[range]:
    """Where the copies of each chunk's prompt begin: prompts of different lengths share a call, repeated.

    Raises ValueError where another node took tokens away.
    """
    lengths = [1 if prompt is None else prompt.length for prompt in host.call_of(options).prompts]
    joined = math.lcm(*lengths)
    if joined > key.shape[1]:
        raise ValueError(
            f"a prompt of {joined} tokens reaches a layer as {key.shape[1]}: another node shortens the text that the "
            "model sees, and Attention Fusion cannot find words in the rest: take that node out."
        )
    return [range(0, joined, length) for length in lengths]


def averaged_rows(mask: Tensor, frames: host.Frames, area: host.Area | None, pictures: int, grid: host.Grid) -> Tensor:
    """A mask (1 or B, h, w), cropped, at a layer's grid: (B, 1, h, w)."""
    return host.rows_of_frames(mask if area is None else area.crop(mask), frames, pictures, *grid)


def nearest_rows(mask: Tensor, frames: host.Frames, area: host.Area | None, pictures: int, grid: host.Grid) -> Tensor:
    """The same by the nearest cell."""
    mask = frames.rows(mask if area is None else area.crop(mask))[:, None].float()
    return torch.nn.functional.interpolate(mask, size=grid, mode="nearest").expand(pictures, -1, -1, -1)
