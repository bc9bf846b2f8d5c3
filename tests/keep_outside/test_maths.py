"""Compositing an edit: weights by hand and by brute force, shifts and tints that are known, outliers."""

import math

import pytest
import torch
from palimpsest.kernels import alignment, colour_match, robust
from palimpsest.kernels import keep_outside as maths
from palimpsest.kernels.pausing import pausing

TINT = torch.tensor([[0.9, 0.05, 0.0], [0.0, 1.1, -0.04], [0.02, 0.0, 0.95]], dtype=torch.float64)
OFFSET = torch.tensor([0.04, -0.03, 0.01], dtype=torch.float64)


def waves(height, width, right=0.0, down=0.0, seed=0):
    """A smooth picture (H, W, 3) in float64 known between its pixels, too, that lies (right, down) pixels off."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height) - down, torch.arange(width) - right, indexing="ij")
    picture = torch.zeros(height, width, 3, dtype=torch.float64)
    for _ in range(30):
        low = 0.12 * torch.rand(2, generator=generator, dtype=torch.float64) - 0.06
        phase = 2 * math.pi * torch.rand(3, generator=generator, dtype=torch.float64)
        amount = torch.rand(3, generator=generator, dtype=torch.float64)
        picture += amount * torch.sin(2 * math.pi * (low[0] * x + low[1] * y)[..., None] + phase)
    return 0.5 + picture / 40


def square(height, width):
    """White in the second quarter of both sides."""
    mask = torch.zeros(height, width)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 1
    return mask


# -------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 7, 12])
@pytest.mark.parametrize("shape", [(17, 23), (1, 9), (5, 4)])
def test_dilation_is_the_largest_value_within_a_disc(radius, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(radius))
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in shape), indexing="ij")
    far = (rows.flatten()[:, None] - rows.flatten()) ** 2 + (columns.flatten()[:, None] - columns.flatten()) ** 2
    expected = torch.where(far <= radius**2, mask.flatten(), -math.inf).amax(1).reshape(shape)
    assert torch.equal(maths.dilate(mask, radius), expected)


def test_shrinking_undoes_growing_of_a_disc_and_leaves_the_border_alone():
    dot = torch.zeros(31, 31)
    dot[15, 15] = 1
    assert torch.equal(maths.grow(maths.grow(dot, 6), -6), dot)
    half = torch.zeros(9, 12)
    half[:, :5] = 1
    shrunk = maths.grow(half, -2)
    assert torch.equal(shrunk[:, :3], torch.ones(9, 3))  # the picture's own border is no edge of the mask
    assert float(shrunk[:, 3:].max()) == 0


def test_growing_keeps_soft_values():
    mask = torch.zeros(5, 7)
    mask[2, 3] = 0.4
    assert maths.grow(mask, 1).unique().tolist() == pytest.approx([0.0, 0.4])
    assert int((maths.grow(mask, 1) > 0).sum()) == 5


def test_distances_are_euclidean_and_infinite_where_nothing_is_outside():
    mask = torch.ones(4, 6)
    mask[0, 0] = 0
    assert maths.distance_to_outside(mask)[3, 4].item() == pytest.approx(5.0)
    assert maths.distance_to_outside(torch.ones(3, 3)).isinf().all()


def test_distances_in_bands_are_those_of_the_whole_as_far_as_they_reach(monkeypatch):
    mask = (torch.rand(40, 23, generator=torch.Generator().manual_seed(1)) > 0.01).float()
    whole = maths.distance_to_outside(mask)
    assert float(whole.max()) > 6
    for rows, reach in ((1, 3), (7, 5), (40, 2), (3, 100)):
        monkeypatch.setattr(maths, "BAND", rows * 23)
        banded = maths.distance_to_outside(mask, reach)
        assert torch.equal(banded.clamp(max=reach), whole.clamp(max=reach))


def test_long_work_can_be_stopped_between_its_parts(monkeypatch):
    """Every part of it calls what `pausing` was given; outside of it nothing is called."""
    asked = []
    picture, mask = torch.rand(64, 64, 3), torch.ones(64, 64)
    work = (
        lambda: maths.dilate(mask, 9),
        lambda: maths.distance_to_outside(mask, 3),
        lambda: alignment.shifted_back(picture, 0.5, 1.5),
    )
    for part in work:
        with pausing(lambda: asked.append(1)):
            part()
        assert asked
        asked.clear()
        part()
        assert not asked


def test_the_feather_begins_at_exactly_zero_and_ends_at_exactly_one():
    ramp = maths.feather_ramp(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 9.0, math.inf]), 3)
    assert ramp.tolist() == pytest.approx([0, 5 / 32, 1 / 2, 27 / 32, 1, 1, 1])
    assert ramp[0] == 0
    assert bool((ramp[4:] == 1).all())
    assert maths.feather_ramp(torch.tensor([0.0, 1.0]), 0).tolist() == [0.0, 1.0]


def test_the_mixture_gives_either_picture_bit_for_bit_at_its_ends():
    source, edited = torch.rand(2, 3, 4, 3)
    source[0, 0] = -0.0
    weights = torch.tensor([[0.0, 1.0, 0.25, 0.5]]).expand(3, 4)
    mixed = maths.mix(source, edited, weights)
    assert torch.equal(mixed[:, 0].contiguous().view(torch.int32), source[:, 0].contiguous().view(torch.int32))
    assert torch.equal(mixed[:, 1], edited[:, 1])
    torch.testing.assert_close(mixed[:, 2], 0.75 * source[:, 2] + 0.25 * edited[:, 2])


# ---------------------------------------------------------------------------------------------------------- the shift


def test_whole_pixels_move_without_a_change_of_value():
    picture = torch.rand(6, 8, 3)
    moved = alignment.shifted_back(picture, 2, -1)
    assert torch.equal(moved[1:, :-2], picture[:-1, 2:])
    assert torch.equal(moved[0, :-2], picture[0, 2:])  # the border row is repeated
    assert torch.equal(alignment.shifted_back(picture, 0.0, 0.0), picture)


def test_lanczos_taps_keep_a_constant_and_are_mirrored():
    taps = alignment.lanczos_taps(0.3)
    assert sum(taps.values()) == pytest.approx(1.0, abs=1e-15)
    mirrored = alignment.lanczos_taps(0.7)
    assert [taps[k] for k in taps] == pytest.approx([mirrored[1 - k] for k in taps])
    assert alignment.lanczos_taps(0.0) == {0: 1.0}


def test_a_smooth_picture_moved_between_pixels_is_what_it_is_there():
    edited = waves(60, 70, right=1.3, down=-0.7)
    moved = alignment.shifted_back(edited, 1.3, -0.7)
    inner = (slice(8, -8), slice(8, -8))
    assert (moved - waves(60, 70))[inner].abs().max() < 2e-3


def test_the_masked_correlation_is_the_one_computed_shift_by_shift():
    generator = torch.Generator().manual_seed(3)
    first, second = torch.rand(2, 13, 17, generator=generator, dtype=torch.float64)
    mask = torch.rand(13, 17, generator=generator) > 0.2
    found = alignment.masked_correlation(first, second, mask, (2, 3))
    for down in range(-2, 3):
        for right in range(-3, 4):
            here = (slice(max(0, -down), 13 - max(0, down)), slice(max(0, -right), 17 - max(0, right)))
            there = (slice(max(0, down), 13 + min(0, down)), slice(max(0, right), 17 + min(0, right)))
            both = mask[here] & mask[there]
            expected = robust.correlation(first[here][both], second[there][both])
            assert found[down + 2, right + 3].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [(128, 128), (97, 211), (640, 530)])
@pytest.mark.parametrize("shift", [(1.3, -0.7), (0.0, 0.0), (-7.25, 5.5)])
def test_the_shift_of_a_tinted_noisy_edit_is_found_outside_alone(size, shift):
    source, edited = waves(*size), waves(*size, *shift)
    edited = edited @ TINT.T + OFFSET + 0.01 * torch.randn(*size, 3, generator=torch.Generator().manual_seed(1))
    mask = square(*size) > 0
    edited[mask] = waves(*size, seed=9)[mask]
    found = alignment.estimate_shift(source, edited, ~mask)
    assert math.dist((found.right, found.down), shift) < 0.04
    assert found.after > 0.95
    assert shift == (0.0, 0.0) or found.after > found.before


def test_a_tenth_of_wrong_pixels_does_not_draw_the_shift_aside():
    source, edited = waves(128, 160), waves(128, 160, 0.6, 0.35)
    edited[:, 100:116] = 1 - edited[:, 100:116]
    found = alignment.estimate_shift(source, edited, square(128, 160) == 0)
    assert math.dist((found.right, found.down), (0.6, 0.35)) < 0.02


def test_a_picture_that_varies_along_one_axis_only_gets_no_shift_along_the_other():
    stripes = torch.sin(torch.arange(90) / 5)[None, :, None].expand(80, -1, 3)
    moved = torch.sin((torch.arange(90) - 0.8) / 5)[None, :, None].expand(80, -1, 3)
    found = alignment.estimate_shift(stripes, moved, torch.ones(80, 90, dtype=torch.bool))
    assert found.right == pytest.approx(0.8, abs=0.02)
    assert found.down == pytest.approx(0.0, abs=1e-3)


def test_no_shift_is_found_in_flat_pictures_or_where_nothing_is_outside():
    flat, everywhere = torch.full((64, 64, 3), 0.5), torch.ones(64, 64, dtype=torch.bool)
    found = alignment.estimate_shift(flat, flat + 0.1, everywhere)
    assert (found.right, found.down, found.after) == (0.0, 0.0, 0.0)
    assert alignment.estimate_shift(flat, flat, ~everywhere) is None


def test_smoothing_is_by_the_binomial_along_both_axes():
    dot = torch.zeros(7, 9, 1, dtype=torch.float64)
    dot[3, 4] = 256
    row = torch.tensor([1.0, 4, 6, 4, 1], dtype=torch.float64)
    expected = torch.zeros(7, 9, dtype=torch.float64)
    expected[1:6, 2:7] = row[:, None] * row
    assert torch.equal(alignment.smoothed(dot)[..., 0], expected)


def test_smoothing_repeats_the_border():
    edge = torch.zeros(1, 6, 1)
    edge[0, 0] = 16
    assert alignment.smoothed(edge)[0, :, 0].tolist() == [11, 5, 1, 0, 0, 0]


def test_smaller_pictures_are_means_of_four_pixels_and_outside_only_where_all_four_are():
    source, edited = waves(1100, 600), waves(1100, 600, seed=1)
    outside = torch.ones(1100, 600, dtype=torch.bool)
    outside[101, 7] = False
    fine, coarse = alignment.pyramid(source, edited, outside)  # 1100 pixels are too many, 275 are few enough
    assert (fine.scale, coarse.scale) == (2, 4)
    halved = alignment.smoothed(edited.view(550, 2, 300, 2, 3).mean((1, 3)))
    torch.testing.assert_close(fine.edited, halved)
    assert (~fine.outside).nonzero().tolist() == [[50, 3]]
    assert (~coarse.outside).nonzero().tolist() == [[25, 1]]


# --------------------------------------------------------------------------------------------------------- the colour


def colours(count=600, seed=0):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_mean_is_moved_to_the_sources():
    e = colours()
    matrix, offset = colour_match.fit_mean(e, e + OFFSET, torch.ones(600, dtype=torch.float64))
    assert torch.equal(matrix, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(offset, OFFSET)


def test_mean_and_spread_give_the_sources_mean_and_spread():
    e, o = colours(), 0.7 * colours(seed=1) + 0.2
    new = colour_match.recolour(e, colour_match.fit_mean_and_spread(e, o, torch.ones(600, dtype=torch.float64)))
    torch.testing.assert_close(new.mean(0), o.mean(0))
    torch.testing.assert_close(new.std(0), o.std(0), rtol=1e-3, atol=0)


def test_the_linear_fit_finds_mixed_channels():
    e = colours()
    matrix, offset = colour_match.fit_linear(e, e @ TINT.T + OFFSET, torch.ones(600, dtype=torch.float64))
    torch.testing.assert_close(matrix, TINT, rtol=0, atol=1e-4)
    torch.testing.assert_close(offset, OFFSET, rtol=0, atol=1e-4)


def test_a_colour_far_from_those_seen_changes_no_more_than_they_do():
    seen = torch.tensor([[0.2, 0.5, 0.5], [0.4, 0.5, 0.5]], dtype=torch.float64)
    fitted = torch.diag(torch.tensor([2.0, 1.0, 1.0]).double()), torch.tensor([-0.1, 0.05, 0.0]).double()
    # c' - c = c - 0.1 in red, from 0.1 to 0.3 on what was seen; 0.05 in green, nothing in blue
    given = torch.tensor([[0.0, 0.1, 0.9], [0.3, 0.1, 0.9], [0.9, 0.1, 0.9]], dtype=torch.float64)
    expected = given + torch.tensor([[0.1, 0.05, 0.0], [0.2, 0.05, 0.0], [0.3, 0.05, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(colour_match.recolour_within(given, fitted, seen), expected)
    torch.testing.assert_close(colour_match.recolour(given, fitted)[2], torch.tensor([1.7, 0.15, 0.9]).double())


def test_the_colours_seen_change_as_the_map_says():
    e = colours()
    fitted = TINT, OFFSET
    torch.testing.assert_close(colour_match.recolour_within(e, fitted, e), colour_match.recolour(e, fitted))


@pytest.mark.parametrize("fit", [colour_match.fit_mean_and_spread, colour_match.fit_linear])
def test_flat_surroundings_change_only_what_they_show(fit):
    grey = torch.full((600, 3), 0.4, dtype=torch.float64)
    matrix, offset = fit(grey, grey + 0.1, torch.ones(600, dtype=torch.float64))
    torch.testing.assert_close(matrix, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(offset, torch.full((3,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("fit", [colour_match.fit_mean, colour_match.fit_mean_and_spread, colour_match.fit_linear])
def test_a_fifth_of_foreign_pixels_does_not_tint_the_edit(fit):
    e = colours()
    diagonal, offset = torch.tensor([1.1, 0.95, 1.0]).double(), OFFSET
    o = (e if fit is colour_match.fit_mean else e * diagonal) + offset
    o[::5] = torch.tensor([1.0, 0.0, 1.0]).double()
    new = colour_match.recolour(e, colour_match.fit_robustly(fit, e, o))
    kept = torch.arange(600) % 5 != 0
    assert (new - o)[kept].abs().max() < 2e-3


def test_the_biweight_is_one_at_no_residual_and_zero_for_outliers():
    weights = robust.biweight(torch.tensor([0.0, 0.01, 0.01, 0.01, 9.0]))
    assert weights[0] == 1
    assert weights[4] == 0
    cut = robust.TUKEY * robust.MAD_TO_STD * 0.01
    assert weights[1].item() == pytest.approx((1 - (0.01 / cut) ** 2) ** 2)
