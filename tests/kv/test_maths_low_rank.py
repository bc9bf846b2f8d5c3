"""Factors of a matrix: the best of their rank, the same for the same input."""

import pytest
import torch
from palimpsest.kernels import low_rank


def test_a_matrix_of_the_rank_comes_back():
    matrix = torch.randn(2, 7, 3) @ torch.randn(2, 3, 5)
    left, right = low_rank.factorise(matrix, 3)
    assert left.shape == (2, 7, 3)
    assert right.shape == (2, 5, 3)
    torch.testing.assert_close(left @ right.mT, matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 23), (23, 40), (3, 64, 48)])
def test_what_is_lost_is_the_tail_of_the_spectrum(shape):
    """Eckart and Young: the squared error of the best rank r is the sum of the other squared singular values."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) ** 3
    left, right = low_rank.factorise(matrix, 9)
    lost = (left @ right.mT - matrix).square().sum((-2, -1))
    best = torch.linalg.svdvals(matrix)[..., 9:].square().sum(-1)
    assert bool((lost >= best * (1 - 1e-4)).all())
    assert bool((lost <= best * 1.1).all())


def test_the_same_matrix_gives_the_same_factors_and_leaves_the_callers_random_numbers_alone():
    matrix = torch.randn(30, 20)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = low_rank.factorise(matrix, 4)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, low_rank.factorise(matrix, 4), strict=True))


def test_half_precision_is_factorised_in_float32():
    matrix = torch.randn(12, 3).half() @ torch.randn(3, 10).half()
    left, right = low_rank.factorise(matrix, 3)
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close(left @ right.mT, matrix.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_beyond_the_matrix_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be 1 to 5"):
        low_rank.factorise(torch.randn(5, 9), rank)


def test_factors_are_worthwhile_only_where_they_are_smaller():
    assert low_rank.worthwhile(4096, 320, 32)
    assert not low_rank.worthwhile(16, 1280, 16)
    assert not low_rank.worthwhile(10, 10, 5)  # exactly as large
    assert not low_rank.worthwhile(10, 10, 0)  # rank 0: in full
