"""Putting an edit back into its source, one picture at a time, with proof that nothing moved outside the mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import keep_outside as maths
from ...kernels.pausing import pause
from .. import host
from ..settings import Settings
from . import matching

AUTOMATIC, STRETCH, CENTRE = "automatic", "stretch", "centre crop"
BLACK = 0.5 / 255  # mask values below half a step of an 8-bit picture count as black
BAND = 2**20  # pixels that are mixed and compared at a time


@dataclass(frozen=True)
class KeepOutsideSettings(Settings):
    """How an edit goes into its source; see PalimpsestKeepOutside for what each does to the picture."""

    grow: int = 0
    feather: int = 8
    colour_match: str = "mean and spread"
    align: str = matching.SUB_PIXEL
    fit: str = AUTOMATIC
    invert_mask: bool = False


@dataclass(frozen=True)
class Found:
    """Of one picture: its largest difference outside, the share of its pixels that was replaced, and what else."""

    largest_outside: float
    replaced: float
    notes: list[str]


# ---------------------------------------------------------------------------------------------------------- the inputs


def picture_count(source: Tensor, edited: Tensor, masks: list[Tensor]) -> int:
    """How many pictures come out. Raises ValueError for pictures, channels or batches that do not go together."""
    for name, pictures in (("source", source), ("edited", edited)):
        if pictures.ndim != 4 or pictures.shape[-1] not in (3, 4) or pictures.numel() == 0:
            raise ValueError(
                f"{name} has shape {tuple(pictures.shape)}: connect pictures of 3 (RGB) or 4 (RGBA) channels."
            )
    count = len(edited)
    if len(source) not in (1, count):
        raise ValueError(
            f"source has {len(source)} pictures and edited has {count}: give one source for all edits, or as "
            "many of one as of the other."
        )
    for number, mask in enumerate(masks):
        if mask.numel() == 0 or mask.ndim < 2:
            raise ValueError(f"mask {number + 1} is empty (shape {tuple(mask.shape)}): connect a painted mask.")
        rows = math.prod(mask.shape[:-2])
        if rows not in (1, count):
            raise ValueError(
                f"mask {number + 1} has {rows} pictures and edited has {count}: give one mask for all, or one for each."
            )
    return count


def row(batch: Tensor, number: int, what: str) -> Tensor:
    """Picture `number` of a batch, the only one of a batch of 1. Raises ValueError for NaN or infinite values."""
    picture = batch[min(number, len(batch) - 1)]
    if not torch.isfinite(picture).all():
        raise ValueError(
            f"{what} holds NaN or infinite values (picture {number + 1}): look at the node that makes it; a VAE in "
            "half precision is a frequent cause."
        )
    return picture


def union(masks: list[Tensor], number: int, size: tuple[int, int], inverted: bool) -> Tensor:
    """The masks of one picture as weights (H, W) in 0..1: the largest of them, or 1 minus it where `inverted`.

    Another size is resized smoothly (bilinear, area-averaged when it shrinks).
    """
    found = torch.zeros(size)
    for i, mask in enumerate(masks):
        one = row(mask.reshape(-1, *mask.shape[-2:]), number, f"mask {i + 1}").to("cpu", torch.float32).clamp(0, 1)
        if one.shape != size:
            one = F.interpolate(one[None, None], size=size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
        found = torch.maximum(found, one)
    found = 1 - found if inverted else found
    return torch.where(found < BLACK, 0.0, found)


@dataclass(frozen=True, eq=False)
class Placed:
    """An edit where it lies in its source: picture (H, W, C); known (H, W) bool, where the edit shows something.

    covered (H, W) bool: where it may go in; beyond `known` its border is repeated.
    """

    picture: Tensor
    known: Tensor
    covered: Tensor
    note: str = ""


def whole(size: tuple[int, int], like: Tensor) -> Tensor:
    """(H, W) bool, everywhere."""
    return torch.ones(size, dtype=torch.bool, device=like.device)


def stretched(source: Tensor, edited: Tensor) -> Placed:
    """The edit (h, w, C) over the whole source (H, W, C)."""
    size = tuple(source.shape[:2])
    everywhere = whole(size, edited)
    note = "" if edited.shape[:2] == size else f"the edit was resized from {in_pixels(edited)} pixels ({STRETCH})"
    return Placed(resized(edited, size), everywhere, everywhere, note)


def centred(source: Tensor, edited: Tensor) -> Placed:
    """The edit of a source that was cropped to its centre, as large as it fits."""
    size = source.shape[:2]
    scale = 1 if host.was_cut(source, edited) else min(size[0] / edited.shape[0], size[1] / edited.shape[1])
    height, width = (max(1, round(side * scale)) for side in edited.shape[:2])
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    placed = edited.new_zeros(*size, edited.shape[-1])
    placed[top : top + height, left : left + width] = resized(edited, (height, width))
    covered = ~whole(size, edited)
    covered[top : top + height, left : left + width] = True
    note = "" if edited.shape[:2] == size else f"the edit was resized from {in_pixels(edited)} pixels ({CENTRE})"
    return Placed(placed, covered, covered, note)


def put_back(source: Tensor, edited: Tensor) -> Placed:
    """The edit of a source that the host's VAE cut, where it cut it: unscaled, in the middle, its border repeated."""
    size = tuple(source.shape[:2])
    placed = host.beyond(edited.movedim(-1, 0), size).movedim(0, -1)
    known = ~whole(size, edited)
    known[host.middle(size, tuple(edited.shape[:2]))] = True
    note = (
        f"the edit shows the middle of the source, {in_pixels(edited)} of {in_pixels(source)} pixels, as a VAE cuts "
        "it: put back there, its border repeated beyond"
    )
    return Placed(placed, known, whole(size, edited), note)


def automatic(source: Tensor, edited: Tensor) -> Placed:
    """An edit where the host's VAE cut it, else over the whole source."""
    return (put_back if host.was_cut(source, edited) else stretched)(source, edited)


FITS = {AUTOMATIC: automatic, STRETCH: stretched, CENTRE: centred}


def in_pixels(picture: Tensor) -> str:
    """Its size, as people write it."""
    return f"{picture.shape[1]} x {picture.shape[0]}"


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture (H, W, C) at another size: bicubic, antialiased when it shrinks, within the range it had."""
    if picture.shape[:2] == size:
        return picture
    new = F.interpolate(picture.movedim(-1, 0)[None], size=size, mode="bicubic", antialias=True)[0].movedim(0, -1)
    return new.clamp(picture.min(), picture.max())


# --------------------------------------------------------------------------------------------------------- one picture


def keep(source: Tensor, edited: Tensor, mask: Tensor, how: KeepOutsideSettings) -> tuple[Tensor, Tensor, Found]:
    """One edit (h, w, C) in its source (H, W, C): the picture, the edit's weights (H, W), and what was found.

    Everything is computed in float32 (float64 for a float64 source); the picture has the source's dtype and
    channels. Raises RuntimeError if a pixel outside differs from the source, which would be a fault of this code.
    """
    size = tuple(source.shape[:2])
    working = torch.float64 if source.dtype == torch.float64 else torch.float32
    base = source.to(working)
    placed = FITS[how.fit](base, edited.to(source.device, working))
    edit, weights = placed.picture, edit_weights(mask.to(source.device), placed.covered, how)
    notes = ["nothing is replaced (the mask is black), the source is given back"]
    if bool((weights > 0).any()):
        pause()
        comparable = (weights == 0) & placed.known & opaque(base) & opaque(edit)
        edit, notes = matching.matched(base, edit, comparable, how.align, how.colour_match)
        notes += [placed.note] if placed.note else []
        if edit.shape[-1] > base.shape[-1]:
            weights = weights * edit[..., 3].clamp(0, 1).to(weights.dtype)
            edit = edit[..., :3]
    result = source.clone()
    largest = 0.0
    for rows in bands(size):
        pause()
        largest = max(largest, put(result[rows], source[rows], edit[rows], weights[rows]))
    return result, weights, Found(largest, (weights > 0).float().mean().item(), notes)


def bands(size: tuple[int, int]) -> list[slice]:
    """The rows of a picture in bands of about BAND pixels, so that temporaries stay small."""
    height = max(1, BAND // size[1])
    return [slice(top, top + height) for top in range(0, size[0], height)]


def put(result: Tensor, source: Tensor, edited: Tensor, weights: Tensor) -> float:
    """Mix an edit into rows of a picture; returns `proved` of them.

    result, a copy, and source (h, W, C) in the source's precision, edited (h, W, 3 or C) in the working one,
    weights (h, W). An edit without transparency leaves the source's.
    """
    outside, channels = weights == 0, edited.shape[-1]
    if not bool(outside.all()):
        below = source[..., :channels]
        mixed = maths.mix(below.to(edited.dtype), edited, weights.to(edited.dtype)).to(source.dtype)
        result[..., :channels] = torch.where(outside[..., None], below, mixed)
    return proved(source, result, outside)


def opaque(picture: Tensor) -> Tensor:
    """The pixels of a picture (H, W, 3 or 4) whose colour is seen, (H, W) bool."""
    return torch.ones_like(picture[..., 0], dtype=torch.bool) if picture.shape[-1] == 3 else picture[..., 3] > 0.99


def edit_weights(mask: Tensor, covered: Tensor, how: KeepOutsideSettings) -> Tensor:
    """The mask grown, cut to where the edit lies, and feathered inwards; 0 stays exactly 0. (H, W)."""
    weights = torch.where(covered, maths.grow(mask, how.grow), 0.0)
    if how.feather and bool((weights > 0).any()):
        weights = weights * maths.feather_ramp(maths.distance_to_outside(weights, how.feather + 1), how.feather)
    return weights


def proved(source: Tensor, result: Tensor, outside: Tensor) -> float:
    """The largest difference outside, which is 0. Raises RuntimeError if a single bit differs there."""
    before, after = source[outside].contiguous(), result[outside].contiguous()
    if not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
        raise RuntimeError("a pixel outside the mask differs from the source: this is a fault, please report it.")
    return (after - before).abs().max().item() if before.numel() else 0.0


# --------------------------------------------------------------------------------------------------------- the report


def report(found: list[Found]) -> str:
    """One line on all pictures, then one on each that has something to tell."""
    share = sum(one.replaced for one in found) / len(found)
    whole = f"{len(found)} picture{'s' * (len(found) > 1)}"
    lines = [
        f"largest difference outside {max(one.largest_outside for one in found):g} ({whole}, every bit compared); "
        f"{100 * share:.1f} % replaced"
    ]
    lines += [f"picture {i + 1}: {'; '.join(one.notes)}" for i, one in enumerate(found) if one.notes]
    return "\n".join(lines)
