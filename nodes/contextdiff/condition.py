"""A class or a layout in the place of the text that an adapter reads: how a CONDITIONING carries it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import kind_of

KEY = "palimpsest_context"  # beside a prompt's tokens: (B, labels, rows, columns), a map of shares


def attached(positive: list, context: Tensor) -> list:
    """A CONDITIONING that carries a map: of as many prompts as there are pictures each gets its own, else each all."""
    own = len(positive) == len(context) > 1
    return [[text, {**extra, KEY: context[i : i + 1] if own else context}] for i, (text, extra) in enumerate(positive)]


def joined(positive: list, pictures: int) -> Tensor | None:
    """The maps that prompts to train on carry, 1 row for all pictures or a row for each; None where they carry none.

    Raises ValueError where some carry one, or for another number.
    """
    found = [extra[KEY] for _, extra in positive if extra.get(KEY) is not None]
    if not found:
        return None
    if len({(kind_of(each), each.shape[1]) for each in found}) > 1 or len(found) < len(positive):
        raise ValueError(
            "some prompts carry a class or layout and others none, or one with other labels: put one Class or Layout "
            "Context behind all of them."
        )
    maps = (
        found[0]
        if len(found) == 1
        else torch.cat([each[i if len(each) > i else 0][None] for i, each in enumerate(found)])
    )
    if len(maps) not in (1, pictures):
        raise ValueError(
            f"there are {len(maps)} classes or layouts for {pictures} pictures: give one for all, or one for each."
        )
    return maps


def told(config: Any, cond: dict) -> Tensor:
    """What an adapter of a config reads of a prompt as the host has resolved it: tokens, or a map.

    Raises ValueError where the prompt does not carry what it reads.
    """
    if config.reads_text:
        return cond["cross_attn"]
    if cond.get(KEY) is None:
        raise ValueError(
            f"the context adapter reads a {config.reads}, and the positive prompt carries none: put Class or Layout "
            "Context behind it."
        )
    return cond[KEY]
