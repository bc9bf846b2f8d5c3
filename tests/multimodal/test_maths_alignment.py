"""Tokens that should stand for words: the mean of what they stand for, and how far they are from it."""

import pytest
import torch
from palimpsest.kernels.token_alignment import stand_for, token_error

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def test_a_token_is_the_mean_of_the_states_it_stands_for():
    states = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 8.0]], dtype=torch.float64)
    chosen = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    wanted = torch.tensor([[1.0, 0.0], [4.0, 6.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(stand_for(states, chosen), wanted)


def test_the_error_by_hand():
    """(1 * (4 + 0) / 2 + 3 * (1 + 1) / 2) / 4, and padding of any content."""
    tokens = torch.tensor([[[2.0, 0.0], [1.0, 1.0], [9.0, 9.0]]], dtype=torch.float64)
    wanted = torch.zeros_like(tokens)
    weight = torch.tensor([[1.0, 3.0, 0.0]], dtype=torch.float64)
    assert token_error(tokens, wanted, weight).tolist() == [1.25]


@pytest.mark.parametrize(("rows", "length", "pieces", "width"), [(1, 1, 1, 1), (3, 7, 5, 13), (2, 61, 77, 24)])
def test_both_are_the_sums_of_their_docstrings(rows, length, pieces, width):
    states, chosen = drawn(pieces, width), torch.rand(length, pieces, generator=GENERATOR) < 0.4
    for token in range(length):
        mean = sum((states[m] for m in range(pieces) if chosen[token, m]), torch.zeros(width, dtype=torch.float64))
        mean = mean / max(1, int(chosen[token].sum()))
        torch.testing.assert_close(stand_for(states, chosen)[token], mean, rtol=1e-12, atol=1e-12)
    tokens, wanted, weight = drawn(rows, length, width), drawn(rows, length, width), drawn(rows, length).abs()
    for row in range(rows):
        total = sum(weight[row, i] * sum((tokens[row, i] - wanted[row, i]) ** 2) for i in range(length))
        expected = total / (width * weight[row].sum())
        torch.testing.assert_close(token_error(tokens, wanted, weight)[row], expected, rtol=1e-12, atol=1e-12)


def test_it_is_nothing_where_tokens_are_as_they_should_be_and_does_not_ask_for_the_scale_of_weights():
    tokens, weight = drawn(2, 5, 6), drawn(2, 5).abs()
    assert not token_error(tokens, tokens, weight).any()
    other = drawn(2, 5, 6)
    torch.testing.assert_close(token_error(tokens, other, weight), token_error(tokens, other, 7 * weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_smaller_numbers_are_summed_in_float32(dtype):
    states, chosen = drawn(9, 16), torch.eye(9, dtype=torch.bool)
    assert stand_for(states.to(dtype), chosen).dtype == torch.float32
    tokens, wanted, weight = drawn(2, 9, 16), drawn(2, 9, 16), torch.ones(2, 9)
    found = token_error(tokens.to(dtype), wanted.to(dtype), weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), token_error(tokens, wanted, weight), rtol=2e-2, atol=0)


def test_the_gradient_goes_into_tokens_by_their_weight():
    tokens = torch.zeros(1, 2, 4, requires_grad=True)
    token_error(tokens, torch.ones(1, 2, 4), torch.tensor([[1.0, 0.0]])).sum().backward()
    assert tokens.grad[0].tolist() == [[-0.5] * 4, [0.0] * 4]


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"stand_for: need states \(M, C\) and chosen \(L, M\), got \(3, 2\) and \(5,"):
        stand_for(torch.zeros(3, 2), torch.zeros(5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"token_error: need .* got \(1, 2, 3\), \(1, 2, 4\), \(1, 2\)"):
        token_error(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2))
