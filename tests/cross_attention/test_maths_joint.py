"""Weighted attention without its matrix, over a sequence of text and picture, against the matrix written out."""

import math

import pytest
import torch
from palimpsest.kernels.cross_attention_mask import masked
from palimpsest.kernels.joint_attention import shares, weighted_attention, within
from torch.nn.functional import scaled_dot_product_attention

TOKENS, WIDTH = 23, 6
GROUPS = [[2, 3], [5], [7, 8, 9]]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(kind, seed):
    """(T, G): all ones, zeros and ones, or values between with some of both."""
    drawn = torch.rand(TOKENS, len(GROUPS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"none": torch.ones_like(drawn), "hard": drawn.round(), "soft": (drawn * 1.6 - 0.3).clamp(0, 1)}[kind]


def both(before, after, dtype=torch.float64, keys=TOKENS):
    """(without the matrix, with it), for two pictures."""
    query, key, value = (random(2, n, WIDTH, seed=i, dtype=dtype) for i, n in enumerate((TOKENS, keys, keys)))

    def attend(queries, kept, values):
        q = query if queries is None else query[:, queries]
        k, v = (t if kept is None else t[:, kept] for t in (key, values))
        return scaled_dot_product_attention(q, k, v)

    groups = [torch.tensor(group) for group in GROUPS]
    found = weighted_attention(attend, value, shares(before, after, groups, keys))
    dense = torch.ones(2, TOKENS, keys, dtype=torch.float64)
    for column, group in enumerate(GROUPS):
        dense[0][:, group], dense[1][:, group] = before[:, [column]], after[:, [column]]
    scores = query.double() @ key.double().mT / math.sqrt(WIDTH)
    return found, masked(scores, *dense) @ value.double()


@pytest.mark.parametrize("after", ["none", "hard", "soft"])
@pytest.mark.parametrize("before", ["none", "hard", "soft"])
def test_it_is_the_matrix(before, after):
    found, wanted = both(weights(before, 3), weights(after, 4))
    torch.testing.assert_close(found, wanted)


def test_keys_that_another_node_added_are_seen_by_all():
    found, wanted = both(weights("hard", 3), weights("soft", 4), keys=TOKENS + 4)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_in_lower_precision(dtype):
    found, wanted = both(weights("soft", 3), weights("soft", 4), dtype)
    plain, exact = both(*torch.ones(2, TOKENS, len(GROUPS), dtype=torch.float64), dtype)
    assert (found - wanted).norm() / wanted.norm() <= 4 * (plain - exact).norm() / exact.norm()


def test_by_hand():
    """Three equal keys, of which the second query does not see the first: a third each, and a half each."""
    value = torch.tensor([[[3.0], [6.0], [9.0]]])
    before = torch.tensor([[1.0], [0.0], [0.5]])

    def attend(queries, keys, values):
        count = 3 if keys is None else len(keys)
        seen = values if keys is None else values[:, keys]
        return seen.sum(1, keepdim=True).expand(1, len(queries), 1) / count

    parts = shares(before, torch.ones(3, 1), [torch.tensor([0])], 3)
    found = weighted_attention(attend, value, parts)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([6.0, 7.5, (1.5 + 6 + 9) / 2.5]))


def test_where_nothing_is_hidden_it_is_one_share_of_everything():
    ones = torch.ones(TOKENS, len(GROUPS))
    (part,) = shares(ones, ones, [torch.tensor(group) for group in GROUPS], TOKENS)
    assert part.keys is None and not part.faint and part.queries.tolist() == list(range(TOKENS))


def test_some_of_the_queries_alone():
    before, after = weights("soft", 3), weights("soft", 4)
    query, key, value = (random(1, TOKENS, WIDTH, seed=i) for i in range(3))

    def attend(queries, kept, values):
        chosen = slice(None) if kept is None else kept
        return scaled_dot_product_attention(query[:, queries], key[:, chosen], values[:, chosen])

    parts = shares(before, after, [torch.tensor(group) for group in GROUPS], TOKENS)
    whole = weighted_attention(attend, value, parts)
    torch.testing.assert_close(weighted_attention(attend, value, within(parts, 10, 19)), whole[:, 10:19])


def test_words_that_only_lose_their_values_take_no_attention_of_their_own():
    """A hard mask after the softmax: as many calls as there are kinds of queries."""
    calls = []

    def attend(queries, keys, values):
        calls.append(len(queries))
        return values[:, : len(queries)]

    after = torch.ones(TOKENS, len(GROUPS))
    after[: TOKENS // 2, 1] = 0
    groups = [torch.tensor(group) for group in GROUPS]
    weighted_attention(attend, random(1, TOKENS, WIDTH), shares(torch.ones_like(after), after, groups, TOKENS))
    assert sorted(calls) == [TOKENS // 2, TOKENS - TOKENS // 2]
