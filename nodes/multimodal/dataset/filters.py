"""Which pictures a dataset leaves out, and why: size, shape, duplicates, scores, text, people (MUMU, section 4).

"We filtered these images to be SFW, high resolution, non-watermarked, and to contain 0 or 1 people", and the synthetic
ones "on a minimum PickScore"; the paper gives no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....kernels.edit_metrics import text_score
from ....kernels.picture_filters import aspect, difference_hash, differing_bits
from ...edit_report import Embedder
from ...host.cancelling import Cancellable
from ...settings import Settings
from .finders import ByDetector, Found, in_pixels
from .text import is_person

TEXT = "text. watermark."  # what a detector is asked for
Score = Callable[[int, Tensor, str], float]  # of a picture, by its number, pixels and caption


@dataclass(frozen=True)
class Limits(Settings):
    """What a picture must be; the defaults let every picture pass. See PalimpsestBuildMultimodalDataset for each."""

    min_picture: int = 0
    max_aspect: float = 0.0
    alike_bits: int = 0
    min_score: float = 0.0
    max_text: float = 1.0
    max_people: int = 0


@dataclass(frozen=True, eq=False)
class PictureFilter:
    """Says of one picture after the other why it is left out; remembers the hashes of those that were not.

    What is cheap is asked first. people: words for them.
    """

    limits: Limits
    score: Score | None = None
    text_share: Score | None = None
    people: tuple[str, ...] = ()
    seen: list[Tensor] = field(default_factory=list)

    def reason(self, index: int, picture: Tensor, caption: str) -> str | None:
        """Why a picture (H, W, 3) in 0..1 is left out; None where it is kept, up to what is found in it."""
        limits, (height, width) = self.limits, picture.shape[:2]
        if min(height, width) < limits.min_picture:
            return f"smaller than {limits.min_picture} px"
        if limits.max_aspect and aspect(height, width) > limits.max_aspect:
            return f"longer than {limits.max_aspect:g} : 1"
        if self.score is not None and self.score(index, picture, caption) < limits.min_score:
            return f"scored below {limits.min_score:g}"
        if self.text_share is not None and self.text_share(index, picture, caption) > limits.max_text:
            return f"with text on more than {100 * limits.max_text:g} %"
        if limits.alike_bits and self.was_there(picture):
            return f"like an earlier one (fewer than {limits.alike_bits} bits)"
        return None

    def was_there(self, picture: Tensor) -> bool:
        """Whether a picture is like one that was kept."""
        bits = self.hash_of(picture)
        return bool(self.seen) and int(differing_bits(bits, torch.stack(self.seen)).min()) < self.limits.alike_bits

    def remember(self, picture: Tensor) -> None:
        """That a picture was kept."""
        if self.limits.alike_bits:
            self.seen.append(self.hash_of(picture))

    @staticmethod
    def hash_of(picture: Tensor) -> Tensor:
        with Cancellable():
            return difference_hash(picture)

    def crowd(self, found: Sequence[Found], caption: str) -> str | None:
        """Why a picture is left out for what was found in it; None where it is kept."""
        most = self.limits.max_people
        people = sum(is_person(caption[each.start : each.end], self.people) for each in found)
        return f"with more than {most} people" if most and people > most else None


# ---- scores ---------------------------------------------------------------------------------------------------------


def given_score(scores: Sequence[float]) -> Score:
    """Scores that another node gave, one for each picture."""
    return lambda index, picture, caption: scores[index]


@dataclass(frozen=True, eq=False)
class ClipScore:
    """How well a picture fits its caption by a CLIP of the host, 0 to 100; PickScore's weights rank as it does."""

    embedder: Embedder

    def __call__(self, index: int, picture: Tensor, caption: str) -> float:
        embedded, _ = self.embedder.pictures(picture[None])
        return float(text_score(embedded.cpu(), self.embedder.text(caption, embedded.shape[-1]).cpu()))


def chosen_score(limits: Limits, scores: Sequence[float], clip_vision: Any, clip: Any) -> Score | None:
    """What scores pictures. Raises ValueError for two ways, half a way, and a least score without any."""
    if scores and clip_vision is not None:
        raise ValueError("scores and clip_vision are both connected, and either scores the pictures: disconnect one.")
    if scores:
        return given_score(scores)
    if clip_vision is not None:
        if clip is None:
            raise ValueError(
                "clip_vision scores pictures by their captions, which clip reads: connect the text half of the same "
                "CLIP to clip, or disconnect clip_vision."
            )
        return ClipScore(Embedder(clip_vision, clip))
    if limits.min_score != 0:
        raise ValueError(
            f"min_score is {limits.min_score:g}, and nothing scores the pictures: connect scores, or clip_vision and "
            "clip, or set it to 0."
        )
    return None


# ---- text in the picture --------------------------------------------------------------------------------------------


def masked_share(masks: Sequence[Tensor]) -> Score:
    """The share of each picture that is white in its mask (n, h, w), of several together."""
    return lambda index, picture, caption: float((masks[index].amax(0) >= 0.5).float().mean())


@dataclass(frozen=True)
class DetectedText:
    """The share of a picture in which a detector finds text and watermarks."""

    finder: ByDetector

    def __call__(self, index: int, picture: Tensor, caption: str) -> float:
        finder, covered = self.finder, torch.zeros(picture.shape[:2], dtype=torch.bool)
        for each in finder.detector.detect(picture, TEXT, finder.box_threshold, finder.text_threshold):
            left, top, right, bottom = in_pixels(each.box, picture)
            covered[top:bottom, left:right] = True
        return float(covered.float().mean())


def chosen_text(limits: Limits, masks: Sequence[Tensor], finder: ByDetector | None) -> Score | None:
    """What finds text in pictures: masks, else the detector. Raises ValueError where there is neither."""
    if limits.max_text >= 1:
        return None
    if masks:
        return masked_share(masks)
    if finder is None:
        raise ValueError(
            f"max_text is {limits.max_text:g}, and nothing says where text is: choose a detector, connect text_masks "
            "(one for each picture, from any text detector), or set it to 1."
        )
    return DetectedText(finder)
