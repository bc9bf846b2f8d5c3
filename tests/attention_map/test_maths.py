"""Attention maps: the mass of words, from all of the attention and from indicator values; maps, masks, leakage."""

import pytest
import torch
from palimpsest.kernels import attention_map as maps
from palimpsest.kernels.kv_inversion import attention

WORDS = [[1], [2, 3], [0, 5, 6]]


def query_and_key(batch=2, queries=15, keys=9, heads=3, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = heads * width
    query = torch.randn(batch, queries, shape, generator=generator, dtype=torch.float64)
    return query, torch.randn(batch, keys, shape, generator=generator, dtype=torch.float64)


def blob(height=20, width=30, low=0.1, high=0.9):
    """A map with a bright rectangle, (1, 1, H, W), and the rectangle."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., 5:14, 8:20] = 1
    return low + (high - low) * mask, mask


def test_mass_worked_by_hand():
    """Scores log 1, log 2, log 5 give shares 1/8, 2/8, 5/8; a second head that sees nothing gives thirds."""
    query = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    scores = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log() * 2**0.5
    key = torch.stack([scores, *[torch.zeros_like(scores)] * 3], -1)[None]
    mass = maps.attention_mass(query, key, [[0], [1, 2]], heads=2)
    expected = torch.tensor([[[(1 / 8 + 1 / 3) / 2, (7 / 8 + 2 / 3) / 2]]])
    torch.testing.assert_close(mass, expected)


def test_all_words_together_have_all_the_attention():
    query, key = query_and_key()
    mass = maps.attention_mass(query, key, [[i] for i in range(9)], 3)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 15))


def test_attention_of_indicator_values_is_the_mass():
    query, key = query_and_key()
    value = maps.indicator_values(WORDS, 9, 3, 4).double().expand(2, -1, -1)
    found = maps.mass_of_output(attention(query, key, value, 3), len(WORDS), 3)
    torch.testing.assert_close(found, maps.attention_mass(query, key, WORDS, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mass_in_half_precision_is_as_near_as_that_precision_allows(dtype):
    query, key = query_and_key()
    value = maps.indicator_values(WORDS, 9, 3, 4).to(dtype).expand(2, -1, -1)
    found = maps.mass_of_output(attention(query.to(dtype), key.to(dtype), value, 3), len(WORDS), 3)
    assert found.dtype == torch.float32
    exact = maps.attention_mass(query, key, WORDS, 3)
    assert (found - exact).abs().max() < 8 * torch.finfo(dtype).eps


def test_indicator_values_refuse_more_words_than_fit_and_positions_outside():
    with pytest.raises(ValueError, match="5 words do not fit into heads of 4"):
        maps.indicator_values([[0]] * 5, 9, 3, 4)
    with pytest.raises(ValueError, match="reach outside of 9 keys"):
        maps.indicator_values([[9]], 9, 3, 4)


def test_levels_are_averaged_at_the_size_of_the_picture():
    levels = [torch.full((2, 3, 4, 5), 0.2), torch.full((2, 3, 2, 3), 0.6)]
    torch.testing.assert_close(maps.averaged(levels, (33, 41)), torch.full((2, 3, 33, 41), 0.4))
    spike = torch.zeros(1, 1, 4, 4)
    spike[..., 1, 1] = 1
    assert maps.averaged([spike], (32, 32)).min() == 0  # bicubic would undershoot


def test_a_map_by_itself_spans_0_to_1():
    found = maps.by_itself(torch.rand(2, 3, 7, 5) * 0.1 + 0.3)
    assert torch.equal(found.amin((-2, -1)), torch.zeros(2, 3))
    assert torch.equal(found.amax((-2, -1)), torch.ones(2, 3))
    assert torch.equal(maps.by_itself(torch.full((1, 1, 3, 3), 0.4)), torch.zeros(1, 1, 3, 3))


def test_words_against_each_other_add_up_to_1_whatever_they_draw_in_all():
    mass = torch.rand(2, 3, 7, 5) + 0.1
    found = maps.against_each_other(mass)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 7, 5))
    louder = mass * torch.tensor([1.0, 50.0, 1.0])[:, None, None]
    torch.testing.assert_close(maps.against_each_other(louder), found)


def test_overlap_is_what_two_masks_share_of_what_either_covers():
    one = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    drawn = torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
    torch.testing.assert_close(maps.overlap(one, drawn), torch.tensor([1 / 2.5, 0.0]))
    assert torch.equal(maps.overlap(drawn.double(), drawn.half()), torch.ones(1))
    assert maps.overlap(one[1:], one[1:]).isnan().all()


def test_leakage_is_the_share_outside():
    mass = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    mask = torch.tensor([[[[0.0, 0.0], [0.5, 1.0]]]])
    torch.testing.assert_close(maps.leakage(mass, mask), torch.tensor([[4.5 / 10, 2.5 / 4]]))
    assert torch.equal(maps.leakage(mass, torch.ones(1, 1, 2, 2)), torch.zeros(1, 2))
    assert maps.leakage(torch.zeros(1, 1, 2, 2), mask).isnan().all()


def test_otsu_parts_two_groups():
    values, mask = blob()
    threshold = maps.otsu(values)
    assert threshold.shape == (1, 1)
    assert torch.equal((values > threshold[..., None, None]).float(), mask)
    assert 0.3 < threshold.item() < 0.7  # in the middle of equally good ones
    noisy = (values + 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert ((noisy > maps.otsu(noisy)[..., None, None]).float() - mask).abs().mean() < 0.01


def test_otsu_is_the_best_of_all_thresholds():
    values = torch.rand(1, 1, 9, 11, generator=torch.Generator().manual_seed(1)) ** 2

    def between(threshold):
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    best = max(between(i / 256) for i in range(20, 230))
    assert between(maps.otsu(values).item()) > 0.99 * best


def test_cleaning_takes_specks_and_holes_and_leaves_the_rest():
    _, mask = blob()
    dirty = mask.clone()
    dirty[..., 1, 1] = 1
    dirty[..., 9, 12] = 0
    assert torch.equal(maps.cleaned(dirty, 1), mask)
    assert torch.equal(maps.cleaned(dirty, 0), dirty)
    whole = torch.ones(2, 6, 7)
    assert torch.equal(maps.cleaned(whole, 3), whole)  # the picture's border does not eat into it


def test_heat_colours_grow_lighter_all_the_way():
    colours = maps.heat_colours(torch.linspace(0, 1, 101))
    lightness = colours @ torch.tensor([0.299, 0.587, 0.114])
    assert (lightness.diff() > 0).all()
    assert colours.min() >= 0
    assert colours.max() <= 1
    torch.testing.assert_close(colours[[0, 25, 100]], torch.tensor([maps.HEAT[0], maps.HEAT[1], maps.HEAT[4]]))
