"""Cross-attention masks: by hand, against each other, and without the matrix against with it."""

import math

import pytest
import torch
from palimpsest.kernels.cross_attention_mask import (
    after_softmax,
    before_softmax,
    biased_keys,
    feathered,
    fused,
    masked,
    renormalised,
    weight,
)
from torch.nn.functional import scaled_dot_product_attention

WORST = 1.3  # of plain attention's own error


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def soft(*shape, seed=0):
    """Weights with whole zeros and ones among them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)


# ---- the equations


def test_after_softmax_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0)]])
    torch.testing.assert_close(after_softmax(scores, torch.tensor([[1.0, 0.5]])), torch.tensor([[0.25, 0.375]]))


def test_the_papers_mask_is_one_for_all_tokens_and_scales_the_output():
    scores, values, mask = random(5, 9), random(9, 4, seed=1), soft(5, 1)
    torch.testing.assert_close(after_softmax(scores, mask) @ values, mask * (torch.softmax(scores, -1) @ values))


def test_renormalised_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0)]])
    torch.testing.assert_close(renormalised(scores, torch.tensor([[1.0, 0.5]])), torch.tensor([[0.4, 0.6]]))


def test_renormalising_after_the_softmax_is_adding_log_m_before_it():
    scores, mask = random(6, 11), soft(6, 11) * 0.9 + 0.1
    kept = after_softmax(scores, mask)
    torch.testing.assert_close(renormalised(scores, mask), kept / kept.sum(-1, keepdim=True))


def test_a_row_masked_in_every_token_is_what_masks_tend_to_that_fall_alike():
    scores = random(3, 7)
    black = renormalised(scores, torch.zeros(3, 7, dtype=torch.float64))
    assert torch.equal(black, torch.softmax(scores, -1))
    torch.testing.assert_close(renormalised(scores, torch.full((3, 7), 1e-30, dtype=torch.float64)), black)


def test_pfb_diff_is_the_renormalised_mask_cut_at_one_half():
    scores, mask = random(8, 10), soft(8, 10)
    mask[:, 0] = 1  # its authors never mask the begin token
    torch.testing.assert_close(before_softmax(scores, mask), renormalised(scores, (mask >= 0.5).double()))


def test_pfb_diffs_trap_a_row_masked_in_every_token_is_uniform_not_empty():
    assert torch.equal(before_softmax(random(2, 4), torch.zeros(2, 4)), torch.full((2, 4), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("function", [after_softmax, renormalised, before_softmax])
def test_a_white_mask_changes_nothing(function):
    scores = random(4, 6)
    assert torch.equal(function(scores, torch.ones(4, 6, dtype=torch.float64)), torch.softmax(scores, -1))


@pytest.mark.parametrize("function", [after_softmax, renormalised, before_softmax])
def test_a_masked_word_has_no_weight(function):
    mask = torch.ones(4, 6, dtype=torch.float64)
    mask[:, 2] = 0
    found = function(random(4, 6), mask)
    assert (found[:, 2] == 0).all()
    whole = torch.ones(4, dtype=torch.float64)
    lost = torch.softmax(random(4, 6), -1)[:, 2] if function is after_softmax else 0
    torch.testing.assert_close(found.sum(-1), whole - lost)


# ---- without the matrix


def attend(query, key, value, bias):
    """PyTorch's fused attention of one head; a bias (B, N, M) or none."""
    mask = None if bias is None else bias[:, None].to(query.dtype)
    return scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], attn_mask=mask)[:, 0]


def cases():
    """name -> (before, after) over tokens [1, 4, 5] of two rows and 40 places."""
    one, some, other = torch.ones(2, 40, 3, dtype=torch.float64), soft(2, 40, 3, seed=3), soft(2, 40, 3, seed=4)
    only_second = torch.cat([one[:1], some[1:]])
    return {
        "after softmax": (one, some),
        "renormalised": (some, one),
        "both": (some, other),
        "hard": (some.round(), other.round()),
        "black": (one, one * 0),
        "black before": (one * 0, one),
        "one row": (one, only_second),
        "one word": (one, torch.cat([some[..., :1], one[..., 1:]], -1)),
    }


TOKENS = [1, 4, 5]


def everywhere(weights, tokens, keys):
    """Weights of some tokens (B, N, S) among all, the others 1."""
    found = weights.new_ones(*weights.shape[:-1], keys)
    found[..., tokens] = weights
    return found


def by_matrix(query, key, value, before, after):
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    return masked(scores, before, after) @ value


@pytest.mark.parametrize("keys", [7, 8, 77])
@pytest.mark.parametrize("name", cases())
def test_fused_attention_gives_what_the_matrix_gives(name, keys):
    before, after = cases()[name]
    query, key, value = random(2, 40, 16), random(2, keys, 16, seed=1), random(2, keys, 16, seed=2)
    found = fused(attend, query, key, value, *biased_keys(before, after, TOKENS, keys))
    wanted = by_matrix(query, key, value, everywhere(before, TOKENS, keys), everywhere(after, TOKENS, keys))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("keys", [3, 8])
def test_every_token_masked_is_zero_after_softmax_and_unmasked_before_it(keys):
    query, key, value = random(1, 5, 8), random(1, keys, 8, seed=1), random(1, keys, 8, seed=2)
    tokens, zero = list(range(keys)), torch.zeros(1, 5, keys, dtype=torch.float64)
    index, bias = biased_keys(zero + 1, zero, tokens, keys)
    assert torch.equal(fused(attend, query, key, value, index, bias), torch.zeros_like(query))
    index, bias = biased_keys(zero, zero + 1, tokens, keys)
    plain = attend(query, key, value, None)
    torch.testing.assert_close(fused(attend, query, key, value, index, bias), plain)
    index, bias = biased_keys(zero, zero, tokens, keys)
    assert torch.equal(fused(attend, query, key, value, index, bias), torch.zeros_like(query))


@pytest.mark.parametrize("keys", [7, 77])
def test_rows_of_the_bias_begin_at_multiples_of_eight_and_nothing_is_copied_without_need(keys):
    before, after = cases()["renormalised"]
    index, bias = biased_keys(before, after, TOKENS, keys)
    assert index is None and bias.stride(-2) % 8 == 0
    index, bias = biased_keys(*cases()["one word"], TOKENS, keys)
    assert index.tolist()[: keys + 1] == [*range(keys), 1]
    assert len(index) == bias.shape[-1] == keys + 1 + -(keys + 1) % 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["after softmax", "renormalised", "both", "hard"])
def test_low_precision_is_as_good_as_plain_attentions(name, dtype):
    """Means over many places: both errors are rounding, the masked one has the rounded bias on top."""
    keys, places, tokens = 77, 1024, [2, 3, 17, 40]
    weights = [soft(2, places, 4, seed=5), soft(2, places, 4, seed=6)]
    one = torch.ones_like(weights[0])
    pairs = {"after softmax": (one, weights[0]), "renormalised": (weights[0], one), "both": tuple(weights)}
    before, after = pairs.get(name) or tuple(w.round() for w in weights)
    query, key, value = (random(2, n, 64, seed=s).to(dtype).double() for s, n in ((0, places), (1, keys), (2, keys)))
    low = [t.to(dtype) for t in (query, key, value)]
    index, bias = biased_keys(before, after, tokens, keys)
    wanted = by_matrix(query, key, value, everywhere(before, tokens, keys), everywhere(after, tokens, keys))
    plain_wanted = attend(query, key, value, None)
    error = (fused(attend, *low, index, bias.to(dtype)).double() - wanted).norm() / wanted.norm()
    plain_error = (attend(*low, None).double() - plain_wanted).norm() / plain_wanted.norm()
    assert error <= WORST * plain_error


def test_other_values_go_through_the_same_attention():
    """An indicator of a word as value gives the share that it has of each query."""
    before, after = cases()["both"]
    query, key = random(2, 40, 16), random(2, 77, 16, seed=1)
    index, bias = biased_keys(before, after, TOKENS, 77)
    word = torch.zeros(2, 77, 16, dtype=torch.float64)
    word[:, 4] = 1
    shares = fused(attend, query, key, word, index, bias)[..., 0]
    scores = query @ key.mT / 4
    wanted = masked(scores, everywhere(before, TOKENS, 77), everywhere(after, TOKENS, 77))[..., 4]
    torch.testing.assert_close(shares, wanted)


# ---- masks


def test_weights_of_both_sides_and_of_half_a_strength():
    mask = torch.tensor([0.0, 0.25, 1.0])
    assert weight(mask, 1.0, False).tolist() == [0.0, 0.25, 1.0]
    assert weight(mask, 1.0, True).tolist() == [1.0, 0.75, 0.0]
    assert weight(mask, 0.5, False).tolist() == [0.5, 0.625, 1.0]
    assert weight(mask, 0.0, True).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_of_one_value_stays_exactly_that_under_feather(value):
    mask = torch.full((2, 9, 5), value)
    assert torch.equal(feathered(mask, 7.0), mask)
    assert feathered(mask, 0.0) is mask


def test_feather_fades_an_edge_over_its_width_and_keeps_its_middle():
    mask = torch.zeros(1, 40, 80)
    mask[..., 40:] = 1
    soft_edge = feathered(mask, 8.0)[0, 20]
    torch.testing.assert_close(soft_edge[39], 1 - soft_edge[40])
    assert soft_edge[31] < 0.05 and soft_edge[48] > 0.95
    assert soft_edge[27] == 0 and soft_edge[52] == 1
    assert (soft_edge.diff() >= -1e-6).all()


@pytest.mark.parametrize("pixels", [4.0, 9.0])
def test_feather_is_a_gaussian_of_half_its_width(pixels):
    """What an edge rises by at each pixel is the Gaussian itself, exp(-k^2 / (2 s^2)) with s = pixels / 2."""
    mask = torch.zeros(1, 31, 81, dtype=torch.float64)
    mask[..., 40:] = 1
    reach = math.ceil(1.5 * pixels)
    rises = feathered(mask, pixels)[0, 7].diff()[39 - reach : 40 + reach]
    k = torch.arange(-reach, reach + 1, dtype=torch.float64)
    torch.testing.assert_close(rises / rises[reach], torch.exp(-(k**2) / (2 * (pixels / 2) ** 2)))
    torch.testing.assert_close(feathered(mask.mT.contiguous(), pixels), feathered(mask, pixels).mT)
