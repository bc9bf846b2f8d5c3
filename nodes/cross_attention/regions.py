"""Regions: which words act where in the picture, and which of a layer's keys they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...kernels.cross_attention_mask import weight
from .. import host
from ..words import ChosenWords, copies


@dataclass(frozen=True)
class Mode:
    """What a mask does to a word's attention.

    renormalise: what the word loses goes to the prompt's other words, instead of to nothing. cut: the mask counts as
    black below 0.5 and as white from there on.
    """

    renormalise: bool
    cut: bool


MODES = {
    "after softmax": Mode(renormalise=False, cut=False),
    "after softmax, renormalised": Mode(renormalise=True, cut=False),
    "before softmax (PFB-Diff)": Mode(renormalise=True, cut=True),
}


@dataclass(frozen=True)
class Hidden:
    """From which tokens of a transformer words are hidden.

    picture: from the picture's tokens where the words may not act. text: from every other token of text, padding and
    reference pictures, which would hand them on. refiner: from other text in the layers that refine it alone.
    others_see: but for what belongs to other regions or to the whole picture: their phrases, and reference pictures.
    """

    picture: bool = True
    text: bool = False
    refiner: bool = False
    others_see: bool = False


PICTURE_ONLY = Hidden()


@dataclass(frozen=True, eq=False)
class Region:
    """One Cross-Attention Mask: words (None: every token) that act in one part of the picture only.

    mask (1 or B, h, w) in 0..1 at any size; outside: they act where it is black. layers: where in the network; window:
    at which noise levels. mask_negative: the same positions of negative prompts too. hidden: from which tokens of a
    transformer. technique: whose node this is; source: the node whose positive output is to be sampled. phrase_of: the
    node whose phrase these words are, or whose region hides them; "" where they are no phrase's.
    """

    name: str
    words: ChosenWords | None
    mask: Tensor
    mode: Mode
    outside: bool
    strength: float
    layers: frozenset[host.LayerKey]
    window: host.Window
    mask_negative: bool
    remarks: host.Remarks = host.UNHEARD
    hidden: Hidden = PICTURE_ONLY
    technique: str = "Cross-Attention Mask"
    source: str = "Select Words"
    phrase_of: str = ""

    def look_at(self, call: host.ModelCall, whole: host.Grid) -> None:
        """Say where the mask does not fit the latent that is sampled."""
        unlike = host.stretched(self.mask, whole)
        if unlike is not None:
            self.remarks.say_once(call.run, unlike)

    def weights(
        self,
        area: host.Area | None,
        pictures: int,
        height: int,
        width: int,
        *,
        whole: host.Grid,
        frames: host.Frames = host.EVERY,
    ) -> Tensor:
        """The words' weight at each of a layer's height x width places, (pictures or 1, height * width) in float32.

        whole: the latent's size, without an area; frames: which of a clip the call shows.
        """
        mask = host.as_encoded(self.mask, whole)
        mask = mask if area is None else area.crop(mask)
        rows = host.rows_of_frames(mask, frames, pictures, height, width)
        grid = (rows if len(mask) > 1 else rows[:1]).flatten(1)
        return weight((grid >= 0.5).float() if self.mode.cut else grid, self.strength, self.outside)

    def tokens(self, call: host.ModelCall, keys: int) -> list[set[int]]:
        """Which of a layer's keys are the words, in the rows of each of a call's prompts.

        Prompts of different lengths share a call, each repeated, and the words are in every copy. Keys behind those
        are what another node added.
        """
        if self.words is None:
            return [self.every_key(prompt, keys) for prompt in call.prompts]
        return [
            {copy + position for copy in begins for position in self.positions(prompt, call.run)}
            for prompt, begins in zip(call.prompts, copies(call), strict=True)
        ]

    def every_key(self, prompt: host.Prompt, keys: int) -> set[int]:
        """All keys, but for a negative prompt that is to be left alone."""
        return set(range(keys)) if self.mask_negative or not prompt.negative else set()

    def positions(self, prompt: host.Prompt, run: host.Run) -> set[int]:
        """The words' tokens in one prompt: where they are, or in a negative one where they are in any other."""
        starts = set(self.words.starts(prompt, run))
        if not starts and prompt.negative and self.mask_negative:
            starts = {start for other in run.prompts.values() for start in self.words.starts(other, run)}
        found = {start + position for start in starts for position in self.words.every_position}
        return {position for position in found if position < prompt.length}
