"""Prompts of pictures that are trained on: text alone, one for all or one for each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WHOLE_PICTURE = ("area", "mask", "control", "gligen", "hooks", "start_percent", "end_percent")


def one_prompt_per_picture(positive: list, pictures: int, name: str = "positive") -> list:
    """A CONDITIONING of one entry, whose tensors have 1 row for all pictures or a row for each.

    Takes one entry for all (which may have rows already), or one entry for each picture in their order; prompts of
    other lengths are repeated to a common one, as the host joins them. name: the input, for messages. Raises ValueError
    for any other number, and for prompts that do not describe the whole picture by text alone.
    """
    for _, extra in positive:
        found = [key for key in WHOLE_PICTURE if extra.get(key) is not None]
        if found:
            raise ValueError(
                f"a prompt to train on describes the whole picture by its text alone, this one has {found[0]!r}: "
                "connect it from before the node that added that."
            )
    if not positive or positive[0][0] is None:
        raise ValueError(f"{name} has no text: connect the prompt that describes the picture.")
    if len(positive) == 1:
        rows = len(positive[0][0])
        if rows in (1, pictures):
            return positive
        raise ValueError(f"{name} has {rows} rows of text for {pictures} pictures: give one, or one for each.")
    if len(positive) != pictures:
        raise ValueError(
            f"{name} has {len(positive)} prompts for {pictures} pictures: give one for all, or one for each in "
            "their order (Conditioning Combine puts them one after the other)."
        )
    return joined(positive)


def joined(positive: list) -> list:
    """One entry of as many rows as there are entries: their texts, pooled outputs, and the pictures they show."""
    tokens = math.lcm(*(text.shape[1] for text, _ in positive))
    extra = dict(positive[0][1])
    for key in [
        key for key in extra if (key == "pooled_output" or key.startswith("concat_")) and extra[key] is not None
    ]:
        extra[key] = torch.cat([row_of(other[key], i, len(positive)) for i, (_, other) in enumerate(positive)])
    text = torch.cat([text[:1].repeat(1, tokens // text.shape[1], 1) for text, _ in positive])
    return [[text, extra]]


def row_of(tensor: Tensor, row: int, rows: int) -> Tensor:
    """A picture's own row (1, ...) of a tensor with one for each, or the first of any other."""
    first = row if len(tensor) == rows else 0
    return tensor[first : first + 1]
