"""Greedy decoding without repetition: a language model goes on with a text, always by its likeliest token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """When a text ends: after `most` tokens, or with one of `stop`. no_repeat: n of the n-grams that come once; 0: any."""

    most: int = 96
    stop: frozenset[int] = frozenset()
    no_repeat: int = 3


def repeating(ids: Sequence[int], n: int) -> list[int]:
    """The tokens that would make the last n tokens an n-gram that was there before.

    {t : (ids[-n+1:], t) is an n-gram of ids}; none for n = 0.
    """
    if n < 1 or len(ids) < n:
        return []
    last = tuple(ids[len(ids) - n + 1 :])
    return sorted({ids[i + n - 1] for i in range(len(ids) - n + 1) if tuple(ids[i : i + n - 1]) == last})


def go_on(
    read: Callable[[int | None], Tensor],
    speak: Callable[[Tensor], Tensor],
    ids: Sequence[int],
    limits: Limits,
    heard: Callable[[list[int]], None] = lambda written: None,
) -> tuple[list[int], Tensor]:
    """(tokens, states (N, D)): what a model goes on with, and its states of all tokens but the last.

    token = argmax over tokens that repeat no n-gram of head(state of the token before)

    read: the states (n, D) of the text so far (None), then of each token that was added. speak: a state (D,) as logits
    (vocabulary,). ids: the tokens of the text so far. heard: told of the tokens after each one.
    """
    states, written = [read(None)], []
    while True:
        logits = speak(states[-1][-1]).float().clone()
        logits[repeating([*ids, *written], limits.no_repeat)] = -torch.inf
        written.append(int(logits.argmax()))
        heard(written)
        if written[-1] in limits.stop or len(written) >= limits.most:
            return written, torch.cat(states)
        states.append(read(written[-1]))
