"""Words masked by region in transformers, where text and picture are one sequence, and recorders that look on.

A word reaches the picture there on three ways: the picture's tokens look at it, other tokens of text look at it and
hand it on, and in some families text looks at text before it meets the picture. `Hidden` says which of them are closed.
Where the picture looks at text in an attention of its own there is the first way only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.joint_attention import Share, shares, weighted_attention, within
from .. import host
from ..words import shortened
from .regions import Region

Part = tuple[int, slice, "list[Share] | None"]  # chunk, its pictures, what their queries see; None: everything


@dataclass(frozen=True)
class JointWords:
    """An act on joint attention: words masked by region; recorders are shown every layer that has a number.

    Without a region in force the attention goes on as it is. recorders: called as recorder.at_joint(attention, attend),
    where attend(value, chunks) is what the picture's tokens get for any other values (R, H, M, D) -> (R, N, H * D), 0
    in the rows of other prompts than those of chunks.
    """

    regions: tuple[Region, ...] = ()
    recorders: tuple[Callable, ...] = ()

    def __call__(self, attention: host.JointAttention) -> Tensor | None:
        if None in attention.call.prompts or not attention.sees_text:
            return None
        parts = self.parts(attention)
        if attention.layer is not None:
            for recorder in self.recorders:
                recorder.at_joint(attention, partial(of_the_picture, attention, parts))
        return None if parts is None else by_parts(attention, parts, attention.value)

    @property
    def unrecorded(self) -> JointWords:
        """The same without those that look on."""
        return replace(self, recorders=())

    def parts(self, attention: host.JointAttention) -> list[Part] | None:
        """What the regions in force make of this layer, found once a run for every size and kind of call."""
        call, layer = attention.call, attention.layer
        active = tuple(region for region in self.regions if acts(region, layer) and call.within(region.window))
        if not active:
            return None
        size = (attention.sequence, attention.tokens, attention.key.shape[2], layer is None, attention.query.device)
        frames = call.frames if any(len(region.mask) > 1 for region in active) else None
        name = ("joint", tuple(region.name for region in active), call.prompts, call.areas, frames, call.pictures, size)
        return call.run.kept(name, lambda: every_part(active, attention, self.regions))


def acts(region: Region, layer: host.LayerKey | None) -> bool:
    """Whether a region acts in a layer: one of those chosen, or one that refines text."""
    return region.hidden.refiner if layer is None else layer in region.layers


# ---- what the masks of some regions are for a call ------------------------------------------------------------------


def every_part(
    regions: tuple[Region, ...], attention: host.JointAttention, every: tuple[Region, ...] = ()
) -> list[Part] | None:
    """By chunk, and by picture where masks differ, what queries see; None where all of them see everything.

    every: those that are not in force as well. Raises ValueError where another node took tokens away.
    """
    call, sequence = attention.call, attention.sequence
    tokens = [region.tokens(call, sequence.text) for region in regions]
    others = [phrases_of_others(region, every, call, sequence.text) for region in regions]
    if any(token >= sequence.text for rows in tokens for row in rows for token in row):
        raise shortened(call, sequence.text)
    found: list[Part] = []
    for chunk, area in enumerate(call.areas):
        words = [rows[chunk] for rows in tokens]
        free = [rows[chunk] for rows in others]
        places = [region_places(region, call, area, sequence) for region in regions]
        rows = max((len(each) for each, some in zip(places, words, strict=True) if some), default=1)
        for row in range(rows):
            pictures = slice(None) if rows == 1 else slice(row, row + 1)
            mine = [each[row if len(each) > 1 else 0] for each in places]
            found.append((chunk, pictures, seen_by(regions, words, mine, attention, free)))
    return None if all(part is None for *_, part in found) else found


def phrases_of_others(region: Region, regions: tuple[Region, ...], call: host.ModelCall, keys: int) -> list[set[int]]:
    """Which keys are other nodes' phrases, in the rows of each of a call's prompts, where they see a region's words."""
    free = [each for each in regions if each.phrase_of not in ("", region.phrase_of) and not each.outside]
    found = [each.tokens(call, keys) for each in free if region.hidden.others_see]
    return [set().union(*(tokens[chunk] for tokens in found)) for chunk in range(call.chunks)]


def region_places(region: Region, call: host.ModelCall, area: host.Area | None, sequence: host.Sequence) -> Tensor:
    """The words' weight at each of the picture's tokens, (pictures or 1, N).

    Several masks are those of a batch's pictures; of a video's frames where the model is one for video.
    """
    whole = call.latent if area is None else area.whole
    region.look_at(call, whole)
    if sequence.apart and sequence.frames > 1 and len(region.mask) > 1:
        masks = host.masks_of_frames(region.mask, sequence.frames, host.video_ratio(call.model))
        frames = replace(region, mask=masks)
        return frames.weights(area, sequence.frames, *sequence.grid, whole=whole).reshape(1, -1)
    weights = region.weights(area, call.pictures, *sequence.grid, whole=whole, frames=call.frames)
    return weights.repeat(1, sequence.frames)


def seen_by(
    regions: tuple[Region, ...],
    words: list[set[int]],
    places: list[Tensor],
    attention: host.JointAttention,
    free: list[set[int]],
) -> list[Share] | None:
    """What the queries of some rows see; None where nothing is hidden from any. words, places: by region.

    free: the tokens of text, by region, from which its words are not hidden.
    """
    hiding = [i for i, row in enumerate(words) if row and bool((places[i] != 1).any())]
    by_token: dict[int, list[int]] = {}
    for region in hiding:
        for token in words[region]:
            by_token.setdefault(token, []).append(region)
    groups: dict[tuple[int, ...], list[int]] = {}
    for token, of in sorted(by_token.items()):
        groups.setdefault(tuple(of), []).append(token)
    if not groups:
        return None
    weights = {i: token_weights(regions[i], words[i] | free[i], places[i], attention) for i in hiding}
    before, after = torch.ones(2, attention.tokens, len(groups))
    for column, of in enumerate(groups):
        for i in of:
            (before if regions[i].mode.renormalise else after)[:, column] *= weights[i]
    if bool((before == 1).all()) and bool((after == 1).all()):
        return None
    device = attention.query.device
    tokens = [torch.tensor(group, device=device) for group in groups.values()]
    return shares(before.to(device), after.to(device), tokens, attention.key.shape[2])


def token_weights(region: Region, free: set[int], places: Tensor, attention: host.JointAttention) -> Tensor:
    """The weight (T,) that a region's words have for every token of a sequence; free: tokens that see all of them."""
    sequence, closed = attention.sequence, 1 - region.strength
    refining = attention.layer is None
    shut = region.hidden.refiner if refining else region.hidden.text
    weights = torch.full((attention.tokens,), closed if shut else 1.0)
    if not refining:
        weights[sequence.image] = places.cpu() if region.hidden.picture else 1.0
    if region.hidden.others_see and not refining and not sequence.layers:  # behind the picture of Z-Image is padding
        weights[sequence.image.stop :] = 1.0
    if not sequence.apart:
        weights[sorted(free)] = 1.0
    return weights


# ---- the attention under them ---------------------------------------------------------------------------------------


def by_parts(attention: host.JointAttention, parts: list[Part], value: Tensor) -> Tensor:
    """The attention (R, T, H * D) for some values (R, H, M, D), part by part."""
    out = []
    for chunk, pictures, seen in parts:
        own = value.unflatten(0, (attention.call.chunks, attention.call.pictures))[chunk, pictures]
        out.append(of_part(attention, (chunk, pictures, seen), own))
    return torch.cat(out)


def of_part(attention: host.JointAttention, part: Part, value: Tensor) -> Tensor:
    """The attention of the rows of one part, (R', T, H * D)."""
    chunk, pictures, seen = part
    if seen is None:
        return attention.part(chunk, pictures, value=value)

    def attend(queries: Tensor | None, keys: Tensor | None, values: Tensor) -> Tensor:
        chosen = (slice(None) if index is None else index for index in (queries, keys))
        return attention.part(chunk, pictures, *chosen, value=values)

    return weighted_attention(attend, value, seen)


def of_the_picture(
    attention: host.JointAttention, parts: list[Part] | None, value: Tensor, chunks: tuple[int, ...] | None = None
) -> Tensor:
    """What the picture's tokens get for some values (R, H, M, D) -> (R, N, H * D); 0 in the rows of other chunks."""
    image, call = attention.sequence.image, attention.call
    chunks = tuple(range(call.chunks)) if chunks is None else chunks
    if parts is None and len(chunks) == call.chunks:
        return attention.part(queries=image, value=value)
    out = []
    for chunk, pictures, seen in parts or [(chunk, slice(None), None) for chunk in range(call.chunks)]:
        own = value.unflatten(0, (call.chunks, call.pictures))[chunk, pictures]
        if chunk not in chunks:
            out.append(own.new_zeros(len(own), attention.sequence.places, own.shape[1] * own.shape[3]))
        elif seen is None:
            out.append(attention.part(chunk, pictures, image, value=own))
        else:
            out.append(of_part(attention, (chunk, pictures, within(seen, image.start, image.stop)), own))
    return torch.cat(out)


def attach_joint(
    patched: Any, family: host.Family, regions: tuple[Region, ...] = (), recorders: tuple[Callable, ...] = ()
) -> None:
    """Add regions or recorders to the joint attention of a clone, behind those that are there."""

    def words(earlier: JointWords | None) -> JointWords:
        ours = earlier or JointWords()
        return JointWords(ours.regions + regions, ours.recorders + recorders)

    host.replace_joint(patched, family, "words", words)
