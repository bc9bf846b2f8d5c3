"""Tokens that some queries do not see, where text and picture are one sequence: weighted attention without its matrix.

The equations are those of cross_attention_mask: softmax(S + log R) (.) M for weights R before and M after the softmax.
There a bias of N x M numbers carries them, which in a joint sequence would be T x T (42 MB a row for FLUX.1 at 1024
pixels in half precision) and would turn the fused attention off that most people have. Here queries that see the same
keys are computed together over just those keys, by any attention at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# attend(queries, keys, value): attention of some queries to some keys, by index (None: all), for all values (..., T, D)
# -> (..., N, C)
Attend = Callable[["Tensor | None", "Tensor | None", Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Faint:
    """A group of tokens (indices of keys) that some queries of a share see in part, by weights (N,) each.

    renormalises: whether a weight before the softmax is among them.
    """

    at: Tensor
    tokens: Tensor
    before: Tensor
    after: Tensor
    renormalises: bool


@dataclass(frozen=True, eq=False)
class Share:
    """Queries that see the same keys, by index; keys None: all of them. faint: groups that some of them see in part.

    silent: keys that all of them attend to and get nothing from.
    """

    queries: Tensor
    keys: Tensor | None
    faint: tuple[Faint, ...] = ()
    silent: Tensor | None = None


def shares(before: Tensor, after: Tensor, groups: Sequence[Tensor], keys: int) -> list[Share]:
    """Part T queries by what they see: tokens of R = 0 are left out, of R = 1 and M = 0 silent, all others are faint.

    before R, after M (T, G): the weights of G groups of tokens for every query; groups: the keys of each, disjoint.
    """
    gone, silent = before == 0, (before == 1) & (after == 0)
    patterns, which = torch.unique(torch.stack([gone, silent], 1), dim=0, return_inverse=True)
    found = []
    for i, (out, mute) in enumerate(patterns.tolist()):
        queries = (which == i).nonzero()[:, 0]
        hidden, quiet = ([groups[g] for g, chosen in enumerate(row) if chosen] for row in (out, mute))
        faint = []
        for g in (g for g in range(len(groups)) if not (out[g] or mute[g])):
            r, m = before[queries, g], after[queries, g]
            at = ((r != 1) | (m != 1)).nonzero()[:, 0]
            if len(at):
                faint.append(Faint(at, groups[g], r[at], m[at], bool((r[at] != 1).any())))
        seen = left_over(hidden, keys) if hidden else None
        found.append(Share(queries, seen, tuple(faint), torch.cat(quiet) if quiet else None))
    return found


def left_over(hidden: Sequence[Tensor], keys: int) -> Tensor:
    """The keys that are in none of some groups."""
    seen = torch.ones(keys, dtype=torch.bool, device=hidden[0].device)
    seen[torch.cat(list(hidden))] = False
    return seen.nonzero()[:, 0]


def within(parts: Sequence[Share], first: int, stop: int) -> list[Share]:
    """The same for the queries first to stop alone; their numbers count from there on no more than the places do."""
    found = []
    for part in parts:
        kept = ((part.queries >= first) & (part.queries < stop)).nonzero()[:, 0]
        if not len(kept):
            continue
        place = torch.full((len(part.queries),), -1, dtype=torch.long, device=kept.device)
        place[kept] = torch.arange(len(kept), device=kept.device)
        faint = tuple(one for one in (among(each, place) for each in part.faint) if len(one.at))
        found.append(replace(part, queries=part.queries[kept], faint=faint))
    return found


def among(faint: Faint, place: Tensor) -> Faint:
    """A faint group for some of a share's queries; place: their new numbers, -1 for those that are gone."""
    at = place[faint.at]
    kept = at >= 0
    return replace(faint, at=at[kept], before=faint.before[kept], after=faint.after[kept])


def weighted_attention(attend: Attend, value: Tensor, parts: Sequence[Share]) -> Tensor:
    """sum_k R M e^s V / sum_k R e^s for the queries of all shares, in ascending order of their numbers -> (..., N, C).

    Where R is 0 the key is left out, which is exact by any attention. For the rest, with P_g = A_g V_g what a group
    gives and a_g the attention it gets, both of the plain attention A of the keys that are seen:

        (A V - sum_g (1 - R_g M_g) P_g) / (1 - sum_g (1 - R_g) a_g)

    P_g and a_g are the same attention of other values: V in the group's rows and 0 elsewhere, and 1 and 0. They are
    asked for where a weight is neither 0 nor 1: mostly a mask's border. With R = 1 and M = 0 it is A V itself, with 0
    for V in the group's rows.
    """
    computed = [share_attention(attend, value, part) for part in parts]
    order = torch.cat([part.queries for part in parts]).argsort()
    return torch.cat(computed, -2).index_select(-2, order)


def share_attention(attend: Attend, value: Tensor, part: Share) -> Tensor:
    """weighted_attention of one share."""
    value = value if part.silent is None else value.index_fill(-2, part.silent, 0.0)
    out = attend(part.queries, part.keys, value)
    if not part.faint:
        return out
    less, mass = torch.zeros_like(out), torch.zeros_like(out)
    for faint in part.faint:
        queries = part.queries[faint.at]
        alone = torch.zeros_like(value)
        alone[..., faint.tokens, :] = value[..., faint.tokens, :]
        r, m = (weight.to(out)[:, None] for weight in (faint.before, faint.after))
        less[..., faint.at, :] += (1 - r * m) * attend(queries, part.keys, alone)
        if faint.renormalises:
            alone[..., faint.tokens, :] = 1
            mass[..., faint.at, :] += (1 - r) * attend(queries, part.keys, alone)
    return (out - less) / (1 - mass)
