"""Attention of a source fused into its edit (FateZero, arXiv:2303.09535, after Prompt-to-Prompt, arXiv:2208.01626).

The maps A = softmax(Q K^T / sqrt(d)) are written down only here, as equations. What a layer returns is linear in its
values, so that A_source V_edit is attention with the source's Q and K and the edit's V: N x C numbers instead of N x N.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from torch import Tensor

    Words = Sequence[tuple[Hashable, Sequence[int]]]  # (what the word is, the tokens it takes)
    Links = Iterable[tuple[int, int]]

# ---- which words of two prompts are the same -------------------------------------------------------------------------


def common(source: Sequence[Hashable], edit: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Pairs (i, j) of equal entries in order: a longest common subsequence, that which comes first in the edit.

    Prompt-to-Prompt aligns tokens by Needleman-Wunsch with match 1, mismatch -1, gap 0, whose best score is the same.
    """
    length = common_lengths(source, edit).numpy()
    pairs, i, j = [], 0, 0
    while i < len(source) and j < len(edit):
        if source[i] == edit[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif length[i + 1, j] >= length[i, j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def common_lengths(source: Sequence[Hashable], edit: Sequence[Hashable]) -> Tensor:
    """Length (S + 1, T + 1) of a longest common subsequence of what begins at i and at j.

    L(i, j) = max(L(i+1, j), L(i, j+1), L(i+1, j+1) + [s_i = e_j]), a row at a time: along it a running maximum.
    """
    numbers: dict[Hashable, int] = {}
    first, second = (torch.tensor([numbers.setdefault(word, len(numbers)) for word in each]) for each in (source, edit))
    length = torch.zeros(len(source) + 1, len(edit) + 1, dtype=torch.int32)
    for i in reversed(range(len(source) if len(edit) else 0)):
        below = length[i + 1]
        grown = torch.maximum(below[:-1], below[1:] + (second == first[i]))
        length[i, :-1] = grown.flip(0).cummax(0).values.flip(0)
    return length


def between(pairs: Sequence[tuple[int, int]], ends: tuple[int, int]) -> list[tuple[range, range]]:
    """What lies between pairs of `common` in both sequences of lengths `ends`: what was replaced by what."""
    edges = [(-1, -1), *pairs, ends]
    return [(range(a + 1, c), range(b + 1, d)) for (a, b), (c, d) in itertools.pairwise(edges)]


def kept_words(source: Words, edit: Words) -> tuple[Tensor, Tensor]:
    """Prompt-to-Prompt's refinement: words of both prompts keep the source's map, new words have their own.

    A[:, j] = A_source[:, m(j)] where token j of the edit is token m(j) of the source, else A_edit[:, j]

    As (link (S, T) with link[m(j), j] = 1, new (T,) with 1 for new tokens), S and T being the largest token + 1.
    """
    link, new = unlinked(source, edit)
    for i, j in common([word for word, _ in source], [word for word, _ in edit]):
        connect(link, new, source[i][1], edit[j][1])
    return link, new


def replaced_words(source: Words, edit: Words) -> tuple[Tensor, Tensor]:
    """Prompt-to-Prompt's replacement: a new word, too, has the map of the word it stands for.

    As kept_words, and between two common words the source's tokens go to those that took their place: one by one, or
    where their numbers differ, each in equal parts to all. Words that nothing stood for have their own map.
    """
    pairs = common([word for word, _ in source], [word for word, _ in edit])
    link, new = kept_words(source, edit)
    for old, fresh in between(pairs, (len(source), len(edit))):
        if old and fresh:
            tokens = ([t for i in part for t in words[i][1]] for words, part in ((source, old), (edit, fresh)))
            connect(link, new, *tokens)
    return link, new


def unlinked(source: Words, edit: Words) -> tuple[Tensor, Tensor]:
    """(link, new) of two prompts without anything in common."""
    counts = [1 + max((t for _, tokens in words for t in tokens), default=-1) for words in (source, edit)]
    return torch.zeros(counts), torch.ones(counts[1])


def connect(link: Tensor, new: Tensor, old: Sequence[int], fresh: Sequence[int]) -> None:
    """Give the maps of `old` tokens to `fresh` ones, in place: one by one, or where numbers differ, in equal parts."""
    if len(old) == len(fresh):
        link[list(old), list(fresh)] = 1
    else:
        link[torch.tensor(list(old))[:, None], list(fresh)] = 1 / len(fresh)
    new[list(fresh)] = 0


# ---- the maps, written down ------------------------------------------------------------------------------------------


def fused_cross_map(source: Tensor, edit: Tensor, link: Tensor, own: Tensor) -> Tensor:
    """A = A_source link + A_edit diag(own); the rows need not sum to 1, as in the published code.

    source (..., N, S), edit (..., N, T), link (S, T), own (T,) -> (..., N, T).
    """
    return source @ link + edit * own


def fused_self_map(source: Tensor, edit: Tensor, mask: Tensor) -> Tensor:
    """s = M s_edit + (1 - M) s_source with M on the queries, (..., N, 1).              arXiv:2303.09535, section 3.2"""
    return mask * edit + (1 - mask) * source


# ---- the same without them -------------------------------------------------------------------------------------------


def linked_values(value: Tensor, link: Tensor) -> Tensor:
    """U = link V: A_source U = (A_source link) V. value (B, T, C), link (S, T) -> (B, S, C)."""
    return torch.einsum("st,btc->bsc", link.to(value), value)


def blend_mask(mass: Tensor, threshold: float) -> Tensor:
    """M = [c_source of the edited words > threshold]: where their attention is, there the edit's own structure acts.

    mass (B, h, w): the share that the words have of each place's cross-attention. As in the published code it is
    widened by one cell (max over 3 x 3) and divided by each picture's largest value; so threshold 0 gives 1 wherever
    there is any mass, and 1 or more gives 0 everywhere. Returns (B, h, w) of 0 and 1 in mass's dtype.
    """
    wide = F.max_pool2d(mass[:, None], 3, 1, 1)[:, 0]
    return (wide > threshold * wide.amax((-2, -1), keepdim=True)).to(mass.dtype)
