"""What a language model is given of a triple, for the states that an edit head reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .. import instruction
from ..quoting import quoted
from .settings import TECHNIQUE
from .triples import Triple

MOST = 96  # tokens of a text that it says itself: Express Instruction's


def language_of(head: Any) -> instruction.MgieModel:
    """The language model of an EDIT_HEAD. Raises ValueError for one without."""
    if not isinstance(head, instruction.EditHead) or head.model is None:
        raise ValueError(f"{TECHNIQUE}: edit_head holds no language model: connect Load MGIE.")
    model = head.model.loaded()
    model.require_images()
    return model


def by(model: instruction.MgieModel) -> Callable[[Triple], instruction.Reading]:
    """What makes a Reading, without states yet, of a triple: of its expressed text, or what the model says itself."""

    def told(triple: Triple) -> instruction.Reading:
        picture, question = triple.picture[0], instruction.asked(instruction.QUESTION, triple.instruction)
        text = " ".join(triple.expressed.split())
        if text:
            return instruction.Reading(model.prompt(question), model.pixels(picture), text, torch.zeros(0))
        reading, answer, *_ = model.write(picture, question, MOST, lambda text, tokens: None)
        text = instruction.cleaned(answer)
        if not text:
            raise ValueError(
                f"{model.name} answered nothing to {quoted(triple.instruction)} that says how the picture should be: "
                "connect expressed, a text for each picture."
            )
        return replace(reading, text=text)

    return told
