"""An edit moved back and recoloured, judged by the pixels outside of the mask alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import alignment
from ...kernels import colour_match as colours
from ...kernels.pausing import pause
from ...kernels.robust import FEWEST, sampled

NONE, WHOLE, SUB_PIXEL = "none", "whole pixels", "sub-pixel"
ROUNDED: dict[str, Callable[[float], float] | None] = {NONE: None, WHOLE: round, SUB_PIXEL: float}
COLOUR_FITS: dict[str, colours.ColourFit] = {  # from the simplest to the richest
    NONE: colours.fit_nothing,
    "mean": colours.fit_mean,
    "mean and spread": colours.fit_mean_and_spread,
    "linear": colours.fit_linear,
}
EQUAL = 1 / 255  # mean difference of colours outside that nobody sees
STILL = 1 / 32  # pixels: an edit that lies off by less is left as it is
LEAST_AGREEMENT = 0.5  # correlation outside below which the edit is taken to have redrawn it
LARGEST_REST = 0.06  # median difference that may be left outside after a colour match
LEAST_GAIN = 0.2  # share of the difference outside that a match must take away
COLOURS = 2**16  # pixels outside that colours are fitted to


def matched(source: Tensor, edited: Tensor, outside: Tensor, align: str, colour_match: str) -> tuple[Tensor, list[str]]:
    """The edit moved back and recoloured as asked, and a note on each; (H, W, C), outside (H, W) bool."""
    notes: list[str] = []
    if align == colour_match == NONE:
        return edited, notes
    low = min(0.0, source.min().item(), edited.min().item())
    high = max(1.0, source.max().item(), edited.max().item())
    if ROUNDED[align]:
        edited, note = aligned(source, edited, outside, ROUNDED[align])
        notes.append(note)
    pause()
    if colour_match != NONE:
        edited, note = recoloured(source, edited, outside, colour_match)
        notes.append(note)
    pause()
    return edited.clamp(low, high), notes


def aligned(source: Tensor, edited: Tensor, outside: Tensor, rounded: Callable) -> tuple[Tensor, str]:
    """The edit moved back by the shift that is found outside, and the note; as it is where nothing speaks for one."""
    shift = alignment.estimate_shift(source[..., :3], edited[..., :3], outside)
    if shift is None:
        return edited, "not aligned (too little is left outside the mask)"
    if shift.after < LEAST_AGREEMENT:
        return edited, f"not aligned (outside, edit and source have little in common: correlation {shift.after:.2f})"
    right, down = rounded(shift.right), rounded(shift.down)
    if math.hypot(right, down) < STILL or 1 - shift.after >= (1 - LEAST_GAIN) * (1 - shift.before):
        return edited, "the edit lies in place"
    note = f"the edit lay {right:+.2f} px right and {down:+.2f} px down, moved back"
    return alignment.shifted_back(edited, right, down), note


def recoloured(source: Tensor, edited: Tensor, outside: Tensor, richest: str) -> tuple[Tensor, str]:
    """The edit in the source's colours as they are found outside, and the note.

    Of `richest` and the simpler fits the one is taken that errs least on halves of the outside which it has not seen:
    what does not hold from one half to the other would not hold inside the mask either.
    """
    places = sampled(outside, COLOURS)
    if len(places) < FEWEST:
        return edited, "colours not matched (too little is left outside the mask)"
    e, s = (t[..., :3].flatten(0, 1)[places].double() for t in (edited, source))
    if (e - s).abs().mean().item() < EQUAL:
        return edited, "the edit has the source's colours"
    halves = [t > t.median() for t in (places // outside.shape[1], places % outside.shape[1])]
    names = list(COLOUR_FITS)[: list(COLOUR_FITS).index(richest) + 1]
    errors = {name: colours.held_out_error(COLOUR_FITS[name], e, s, halves) for name in names}
    best = min(errors, key=errors.__getitem__)
    fitted = colours.fit_robustly(COLOUR_FITS[best], e, s)
    pause()
    new = colours.recolour(e, fitted)
    if (new - s).abs().mean(1).median().item() > LARGEST_REST:
        return edited, "colours not matched (outside, edit and source have little in common)"
    if errors[best] >= (1 - LEAST_GAIN) * errors[NONE]:
        return edited, "colours left as they are (no tint that holds everywhere outside)"
    whole = torch.cat([colours.recolour_within(edited[..., :3], fitted, e), edited[..., 3:]], -1)
    return whole, colour_note(best, e, new, s)


def colour_note(fit: str, edited: Tensor, new: Tensor, source: Tensor) -> str:
    """What a colour match did to colours (P, 3) outside, in steps of an 8-bit picture."""
    steps = 255 * (new - edited).mean(0)
    levels = ", ".join(f"{name} {step:+.1f}" for name, step in zip("RGB", steps.tolist(), strict=True))
    before, after = (255 * (colour - source).abs().mean().item() for colour in (edited, new))
    gain = f"which brings the difference outside from {before:.1f} to {after:.1f}"
    return f"colours changed ({fit}) by {levels} levels on average, {gain}"
