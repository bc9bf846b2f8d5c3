"""The numbers of an edit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import edit_metrics as metrics
from ..colours import rgb
from .embedding import Embedder


@dataclass(frozen=True)
class Measure:
    """One number of the report: its name, unit, what it says, and how many digits are worth showing."""

    label: str
    unit: str
    says: str
    digits: int = 2


MEASURES = {
    "psnr": Measure("PSNR", "dB", "whole picture against the source, higher is nearer", 2),
    "ssim": Measure("SSIM", "", "whole picture against the source, 1 is equal", 4),
    "background_psnr": Measure("background PSNR", "dB", "outside the mask, inf is bit-identical", 2),
    "background_ssim": Measure("background SSIM", "", "outside the mask, 1 is equal", 4),
    "structure": Measure("structure distance", "x 1000", "layout against the source, 0 is equal", 2),
    "ideal_psnr": Measure("PSNR to the ideal", "dB", "whole picture against the ideal edit", 2),
    "ideal_inside_psnr": Measure("PSNR to the ideal, inside", "dB", "inside the mask against the ideal edit", 2),
    "clip_text": Measure("CLIP-text", "", "agreement with the prompt, CLIP score 0 to 100", 2),
    "clip_direction": Measure("CLIP-direction", "", "whether the change is the change of the prompts, -1 to 1", 3),
    "clip_temporal": Measure("CLIP-temp", "", "mean cosine of all pairs of frames, 1 is still", 4),
    "frame_change": Measure("frame change", "", "change between frames relative to the source's, 1 is as steady", 3),
}


Numbers = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit and what it is held against; what is left out is not measured.

    source, edited, ideal (B, H, W, 3) in 0..1; mask (B, H, W), 1 where the edit was wanted; is_clip: B frames in order.
    """

    source: Tensor
    edited: Tensor
    mask: Tensor | None = None
    ideal: Tensor | None = None
    prompt: str = ""
    source_prompt: str = ""
    is_clip: bool = False


def measure(edit: Edit, embedder: Embedder | None = None) -> Numbers:
    """Every number that the inputs allow: name in MEASURES -> (B,), or a scalar for those of a whole clip."""
    numbers = kept(edit) | (nearness(edit) if edit.ideal is not None else {})
    if embedder is not None:
        numbers |= understood(edit, embedder)
    if edit.is_clip:
        numbers["frame_change"] = metrics.frame_change(edit.edited) / metrics.frame_change(edit.source)
    return numbers


def kept(edit: Edit) -> Numbers:
    """How near the edit is to its source.

    What lies outside is counted alone: an average over outside pixels, not over pictures with the inside blackened.
    """
    pair = edit.edited, edit.source
    numbers = {"psnr": metrics.psnr(*pair), "ssim": metrics.ssim(*pair)}
    if edit.mask is not None:
        outside = (edit.mask == 0).float()
        numbers |= {"background_psnr": metrics.psnr(*pair, outside), "background_ssim": metrics.ssim(*pair, outside)}
    return numbers


def nearness(edit: Edit) -> Numbers:
    """How near the edit is to the right answer."""
    numbers = {"ideal_psnr": metrics.psnr(edit.edited, edit.ideal)}
    if edit.mask is not None:
        numbers["ideal_inside_psnr"] = metrics.psnr(edit.edited, edit.ideal, edit.mask)
    return numbers


def understood(edit: Edit, embedder: Embedder) -> Numbers:
    """What CLIP makes of both pictures, and of the prompts where it reads."""
    (before, patches_before), (after, patches_after) = (embedder.pictures(p) for p in (edit.source, edit.edited))
    numbers = {"structure": 1000 * metrics.structure_distance(patches_after, patches_before)}
    if embedder.clip is not None and edit.prompt.strip():
        wanted = embedder.text(edit.prompt, after.shape[-1])
        numbers["clip_text"] = metrics.text_score(after, wanted)
        if edit.source_prompt.strip():
            described = embedder.text(edit.source_prompt, after.shape[-1])
            numbers["clip_direction"] = metrics.direction_score(before, after, described, wanted)
    if edit.is_clip:
        numbers["clip_temporal"] = metrics.frame_consistency(after)
    return numbers


def matched(image: Tensor, pictures: int, size: tuple[int, int], what: str) -> tuple[Tensor, bool]:
    """An IMAGE as (pictures, *size, 3) in 0..1, and whether it was resized.

    Raises ValueError for another batch, and as `rgb`.
    """
    image = rgb(image, what)
    if len(image) not in (1, pictures):
        raise ValueError(f"{what} has {len(image)} pictures, edited has {pictures}: give one for all, or one for each.")
    image = image.to("cpu", torch.float32).clamp(0, 1)  # with --gpu-only some pictures are on the GPU
    resized = tuple(image.shape[1:3]) != size
    if resized:
        image = F.interpolate(image.movedim(-1, 1), size=size, mode="bicubic", antialias=True).movedim(1, -1)
    return image.clamp(0, 1).expand(pictures, -1, -1, -1), resized
