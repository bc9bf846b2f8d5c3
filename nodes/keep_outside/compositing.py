"""Putting an edit back into its original, one picture at a time, with proof that nothing moved outside the mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import keep_outside as maths

NONE = "none"
STRETCH, CENTRE = "stretch", "centre crop"
WHOLE, SUB_PIXEL = "whole pixels", "sub-pixel"
COLOUR_FITS: dict[str, Callable] = {  # from the simplest to the richest
    NONE: maths.fit_nothing,
    "mean": maths.fit_mean,
    "mean and spread": maths.fit_mean_and_spread,
    "linear": maths.fit_linear,
}
ROUNDED: dict[str, Callable[[float], float] | None] = {NONE: None, WHOLE: round, SUB_PIXEL: float}
BLACK = 0.5 / 255  # mask values below half a step of an 8-bit picture count as black
EQUAL = 1 / 255  # mean difference of colours outside that nobody sees
STILL = 1 / 32  # pixels: an edit that lies off by less is left as it is
LEAST_AGREEMENT = 0.5  # correlation outside below which the edit is taken to have redrawn it
BAND = 2**20  # pixels that are mixed and compared at a time
LARGEST_REST = 0.06  # median difference that may be left outside after a colour match
LEAST_GAIN = 0.2  # share of the difference outside that a match must take away
COLOURS = 2**16  # pixels outside that colours are fitted to


@dataclass(frozen=True)
class Composition:
    """How an edit goes into its original; the words of `colour_match`, `align` and `fit` are the node's."""

    grow: int = 0
    feather: int = 0
    colour_match: str = NONE
    align: str = NONE
    fit: str = STRETCH


@dataclass(frozen=True)
class Found:
    """Of one picture: its largest difference outside, the share of its pixels that was replaced, and what else."""

    largest_outside: float
    replaced: float
    notes: list[str]


# ---------------------------------------------------------------------------------------------------------- the inputs


def picture_count(original: Tensor, edited: Tensor, masks: list[Tensor]) -> int:
    """How many pictures come out. Raises ValueError for pictures, channels or batches that do not go together."""
    for name, pictures in (("original", original), ("edited", edited)):
        if pictures.ndim != 4 or pictures.shape[-1] not in (3, 4) or pictures.numel() == 0:
            raise ValueError(
                f"{name} has shape {tuple(pictures.shape)}: connect pictures of 3 (RGB) or 4 (RGBA) channels."
            )
    count = len(edited)
    if len(original) not in (1, count):
        raise ValueError(
            f"original has {len(original)} pictures and edited has {count}: give one original for all edits, or as "
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


def stretched(edited: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The edit (h, w, C) over the whole original (H, W, C), and where it lies: everywhere, (H, W) bool."""
    return resized(edited, size), torch.ones(size, dtype=torch.bool, device=edited.device)


def centred(edited: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The edit of an original that was cropped to its centre: as large as it fits, and where it lies (H, W) bool."""
    scale = min(size[0] / edited.shape[0], size[1] / edited.shape[1])
    height, width = (max(1, round(side * scale)) for side in edited.shape[:2])
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    placed = edited.new_zeros(*size, edited.shape[-1])
    placed[top : top + height, left : left + width] = resized(edited, (height, width))
    covered = torch.zeros(size, dtype=torch.bool, device=edited.device)
    covered[top : top + height, left : left + width] = True
    return placed, covered


FITS = {STRETCH: stretched, CENTRE: centred}


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture (H, W, C) at another size: bicubic, antialiased when it shrinks, within the range it had."""
    if picture.shape[:2] == size:
        return picture
    new = F.interpolate(picture.movedim(-1, 0)[None], size=size, mode="bicubic", antialias=True)[0].movedim(0, -1)
    return new.clamp(picture.min(), picture.max())


# --------------------------------------------------------------------------------------------------------- one picture


def keep(original: Tensor, edited: Tensor, mask: Tensor, how: Composition) -> tuple[Tensor, Tensor, Found]:
    """One edit (h, w, C) in its original (H, W, C): the picture, the edit's weights (H, W), and what was found.

    Everything is computed in float32 (float64 for a float64 original); the picture has the original's dtype and
    channels. Raises RuntimeError if a pixel outside differs from the original, which would be a fault of this code.
    """
    size = tuple(original.shape[:2])
    working = torch.float64 if original.dtype == torch.float64 else torch.float32
    base = original.to(working)
    edit, covered = FITS[how.fit](edited.to(original.device, working), size)
    weights = edit_weights(mask.to(original.device), covered, how)
    notes = ["nothing is replaced (the mask is black), the original is given back"]
    if bool((weights > 0).any()):
        comparable = (weights == 0) & covered & opaque(base) & opaque(edit)
        edit, notes = matched(base, edit, comparable, how)
        if edited.shape[:2] != size:
            notes.append(f"the edit was resized from {edited.shape[1]} x {edited.shape[0]} pixels ({how.fit})")
        if edit.shape[-1] > base.shape[-1]:
            weights = weights * edit[..., 3].clamp(0, 1).to(weights.dtype)
            edit = edit[..., :3]
    result = original.clone()
    largest = max(put(result[rows], original[rows], edit[rows], weights[rows]) for rows in bands(size))
    return result, weights, Found(largest, (weights > 0).float().mean().item(), notes)


def bands(size: tuple[int, int]) -> list[slice]:
    """The rows of a picture in bands of about BAND pixels, so that temporaries stay small."""
    height = max(1, BAND // size[1])
    return [slice(top, top + height) for top in range(0, size[0], height)]


def put(result: Tensor, original: Tensor, edited: Tensor, weights: Tensor) -> float:
    """Mix an edit into rows of a picture; returns `proved` of them.

    result, a copy, and original (h, W, C) in the original's precision, edited (h, W, 3 or C) in the working one,
    weights (h, W). An edit without transparency leaves the original's.
    """
    outside, channels = weights == 0, edited.shape[-1]
    if not bool(outside.all()):
        below = original[..., :channels]
        mixed = maths.mix(below.to(edited.dtype), edited, weights.to(edited.dtype)).to(original.dtype)
        result[..., :channels] = torch.where(outside[..., None], below, mixed)
    return proved(original, result, outside)


def opaque(picture: Tensor) -> Tensor:
    """The pixels of a picture (H, W, 3 or 4) whose colour is seen, (H, W) bool."""
    return torch.ones_like(picture[..., 0], dtype=torch.bool) if picture.shape[-1] == 3 else picture[..., 3] > 0.99


def edit_weights(mask: Tensor, covered: Tensor, how: Composition) -> Tensor:
    """The mask grown, cut to where the edit lies, and feathered inwards; 0 stays exactly 0. (H, W)."""
    weights = torch.where(covered, maths.grow(mask, how.grow), 0.0)
    if how.feather and bool((weights > 0).any()):
        weights = weights * maths.feather_ramp(maths.distance_to_outside(weights), how.feather)
    return weights


def proved(original: Tensor, result: Tensor, outside: Tensor) -> float:
    """The largest difference outside, which is 0. Raises RuntimeError if a single bit differs there."""
    before, after = original[outside].contiguous(), result[outside].contiguous()
    if not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
        raise RuntimeError("a pixel outside the mask differs from the original: this is a fault, please report it.")
    return (after - before).abs().max().item() if before.numel() else 0.0


# ------------------------------------------------------------------------------------------- matching shift and colour


def matched(original: Tensor, edited: Tensor, outside: Tensor, how: Composition) -> tuple[Tensor, list[str]]:
    """The edit moved back and recoloured as `how` asks, and a note on each, judged by the pixels outside alone."""
    notes: list[str] = []
    if how.align == how.colour_match == NONE:
        return edited, notes
    low = min(0.0, original.min().item(), edited.min().item())
    high = max(1.0, original.max().item(), edited.max().item())
    if ROUNDED[how.align]:
        edited, note = aligned(original, edited, outside, ROUNDED[how.align])
        notes.append(note)
    if how.colour_match != NONE:
        edited, note = recoloured(original, edited, outside, how.colour_match)
        notes.append(note)
    return edited.clamp(low, high), notes


def aligned(original: Tensor, edited: Tensor, outside: Tensor, rounded: Callable) -> tuple[Tensor, str]:
    """The edit moved back by the shift that is found outside, and the note; as it is where nothing speaks for one."""
    shift = maths.estimate_shift(original[..., :3], edited[..., :3], outside)
    if shift is None:
        return edited, "not aligned (too little is left outside the mask)"
    if shift.after < LEAST_AGREEMENT:
        return edited, f"not aligned (outside, edit and original have little in common: correlation {shift.after:.2f})"
    right, down = rounded(shift.right), rounded(shift.down)
    if math.hypot(right, down) < STILL or 1 - shift.after >= (1 - LEAST_GAIN) * (1 - shift.before):
        return edited, "the edit lies in place"
    return maths.shifted_back(
        edited, right, down
    ), f"the edit lay {right:+.2f} px right and {down:+.2f} px down, moved back"


def recoloured(original: Tensor, edited: Tensor, outside: Tensor, richest: str) -> tuple[Tensor, str]:
    """The edit in the original's colours as they are found outside, and the note.

    Of `richest` and the simpler fits the one is taken that errs least on halves of the outside which it has not seen:
    what does not hold from one half to the other would not hold inside the mask either.
    """
    places = maths.sampled(outside, COLOURS)
    if len(places) < maths.FEWEST:
        return edited, "colours not matched (too little is left outside the mask)"
    e, o = (t[..., :3].flatten(0, 1)[places].double() for t in (edited, original))
    rows, columns = places // outside.shape[1], places % outside.shape[1]
    halves = [t > t.median() for t in (rows, columns)]
    if (e - o).abs().mean().item() < EQUAL:
        return edited, "the edit has the original's colours"
    names = list(COLOUR_FITS)[: list(COLOUR_FITS).index(richest) + 1]
    errors = {name: maths.held_out_error(COLOUR_FITS[name], e, o, halves) for name in names}
    best = min(errors, key=errors.__getitem__)
    new = maths.recolour(e, fitted := maths.fit_robustly(COLOUR_FITS[best], e, o))
    if (new - o).abs().mean(1).median().item() > LARGEST_REST:
        return edited, "colours not matched (outside, edit and original have little in common)"
    if errors[best] >= (1 - LEAST_GAIN) * errors[NONE]:
        return edited, "colours left as they are (no tint that holds everywhere outside)"
    levels = ", ".join(f"{name} {255 * x:+.1f}" for name, x in zip("RGB", (new - e).mean(0).tolist(), strict=True))
    difference = " to ".join(f"{255 * (t - o).abs().mean().item():.1f}" for t in (e, new))
    whole = torch.cat([maths.recolour_within(edited[..., :3], fitted, e), edited[..., 3:]], -1)
    gain = f"which brings the difference outside from {difference}"
    note = f"colours changed ({best}) by {levels} levels on average, {gain}"
    return whole, note


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
