"""Edit Instruction: an expressed instruction as the three prompts of InstructPix2Pix's two guidances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.connector import repeated
from ..settings import Settings
from ..words import WITHOUT_WORDS
from .edit_head import EditHead, Reading
from .express import readings_of
from .wording import lines

TEXT, HEAD = "expressed text", "edit head"
MADE_BY = "the edit head of Edit Instruction"


@dataclass(frozen=True)
class EditSettings(Settings):
    """The text, and what reads it; see PalimpsestEditInstruction for each."""

    text: str = ""
    route: str = TEXT


@dataclass(frozen=True, eq=False)
class Edited:
    """CONDITIONING with the text, and without; what a report says of them."""

    positive: list
    without_text: list
    report: str


def by_text(clip: Any, texts: Sequence[str]) -> Edited:
    """The texts as a text encoder reads them, a row for each. Raises ValueError without one, and without a text."""
    if not texts:
        raise ValueError("there is no text: write one in text, or connect expressed (Express Instruction).")
    if clip is None:
        raise ValueError(f"route '{TEXT}' reads the text with a text encoder: connect the checkpoint's clip.")
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    positive = encoded[0] if len(encoded) == 1 else stacked(encoded)
    return Edited(positive, empty, report(texts, positive, "read by the text encoder"))


def stacked(encoded: Sequence[list]) -> list:
    """One CONDITIONING of some, a row for each; shorter texts are repeated to the length of the longest."""
    parts = []
    for each in zip(*encoded, strict=True):
        length = math.lcm(*(tensor.shape[1] for tensor, _ in each))
        extra = dict(each[0][1])
        pooled = [beside.get("pooled_output") for _, beside in each]
        if all(isinstance(tensor, Tensor) for tensor in pooled):
            extra["pooled_output"] = torch.cat(pooled)
        parts.append([torch.cat([repeated(tensor, length) for tensor, _ in each]), extra])
    return parts


def by_head(head: EditHead | None, texts: Sequence[str]) -> Edited:
    """What MGIE's edit head makes of its language model's states, a row for each text.

    texts: none for those that were expressed; the states of another text are read again. Raises ValueError without a
    head, and where nothing was read.
    """
    if not isinstance(head, EditHead):
        raise ValueError(f"route '{HEAD}' needs MGIE's edit head: connect edit_head of Express Instruction.")
    head.require_network()
    texts = list(texts) or [reading.text for reading in head.readings]
    readings = readings_of(head, len(texts))
    texts = texts * len(readings) if len(texts) == 1 else texts
    read = [again(head, reading, text) for reading, text in zip(readings, texts, strict=True)]
    changed = sum(now is not before for now, before in zip(read, readings, strict=True))
    positive = conditioning(head.prompts(torch.stack([each.states for each in read])))
    how = "read by the edit head" + (f", {changed} of {len(read)} anew after an edit" if changed else "")
    return Edited(positive, conditioning(head.null()), report(texts, positive, how))


def again(head: EditHead, reading: Reading, text: str) -> Reading:
    """The reading, or one of another text. Raises ValueError where no language model is there to read that."""
    if text == reading.text:
        return reading
    if head.model is None:
        raise ValueError(f"the text was edited, and {head.name} has no language model to read it: leave text empty.")
    return head.model.loaded().read(reading, text)


def conditioning(prompts: Tensor) -> list:
    """A CONDITIONING of prompts (B, L, D) whose tokens are no words."""
    return [[prompts, {"pooled_output": torch.zeros(len(prompts), prompts.shape[-1]), WITHOUT_WORDS: MADE_BY}]]


def edit(settings: EditSettings, clip: Any, expressed: str | None, head: EditHead | None) -> Edited:
    """The prompts of the text that a person wrote, or else of the expressed one, a line for each picture."""
    texts = lines(settings.text) or lines(expressed or "")
    return by_head(head, texts) if settings.route == HEAD else by_text(clip, texts)


def report(texts: Sequence[str], positive: list, how: str) -> str:
    """The texts that act, and what became of them."""
    rows = [f"{number}: {text}" for number, text in enumerate(texts, 1)] if len(texts) > 1 else list(texts)
    tensor = positive[0][0]
    return "\n".join([*rows, f"{how}: {tensor.shape[1]} tokens of {tensor.shape[2]} channels, {len(tensor)} a batch"])
