"""The blending equations, by hand and by their limits."""

import itertools

import pytest
import torch
from palimpsest.kernels import feature_blend as maths
from palimpsest.kernels.ddim import ddim_step


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_weight_is_the_inner_alpha_on_white_and_the_outer_one_on_black():
    mask = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    expected = torch.tensor([0.75, 0.5, 0.5 + 0.25 * 0.25], dtype=torch.float64)
    torch.testing.assert_close(maths.blend_weight(mask, 0.75, 0.5), expected)
    assert maths.blend_weight(None, 0.3, 0.9) == 0.3


def test_the_largest_nearby_is_max_pools_bit_for_bit():
    assert maths.largest_near(torch.tensor([3.0, 0.0, 1.0, 0.0, 0.0]), 1, 0).tolist() == [3, 3, 1, 1, 0]
    for size, radius in itertools.product((1, 5, 19), (0, 1, 2, 3, 4, 5, 13, 14, 40)):
        x = torch.rand(2, size, 7, generator=torch.Generator().manual_seed(radius))
        pooled = torch.nn.functional.max_pool2d(x[:, None], (2 * radius + 1, 1), 1, (radius, 0))[:, 0]
        assert torch.equal(maths.largest_near(x, radius, 1), pooled)


def test_blending_by_hand():
    ours, theirs = torch.tensor([4.0]), torch.tensor([2.0])
    assert maths.blend(ours, theirs, 0.75).item() == 3.5
    assert maths.blend(ours, theirs, torch.tensor([0.25])).item() == 2.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_one_and_zero_give_the_two_back_bit_for_bit(dtype):
    ours, theirs = (double(2, 3, 5, 7, seed=i).to(dtype) * 100 for i in range(2))
    ends = [tuple(make(shape) for make in (torch.ones, torch.zeros)) for shape in ((), (2, 1, 5, 7))]
    ends += [tuple(end.to(dtype) for end in pair) for pair in ends]
    for one, zero in ((1.0, 0.0), *ends):
        assert torch.equal(maths.blend(ours, theirs, one), ours)
        assert torch.equal(maths.blend(ours, theirs, zero), theirs)


def test_it_is_equation_1_of_the_paper_and_pfb_diffs_formula():
    ours, theirs, mask = double(2, 3, 4, 5), double(2, 3, 4, 5, seed=1), double(2, 1, 4, 5, seed=2).sigmoid()
    alpha = 0.3
    torch.testing.assert_close(maths.blend(ours, theirs, alpha), alpha * ours + (1 - alpha) * theirs)
    by_mask = maths.blend(ours, theirs, maths.blend_weight(mask, 1.0, 0.0))
    torch.testing.assert_close(by_mask, ours * mask + theirs * (1 - mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wide_weight_is_applied_in_its_own_precision(dtype):
    ours, theirs, weight = double(64), double(64, seed=1), torch.tensor(0.3)
    exact = torch.lerp(theirs.to(dtype).double(), ours.to(dtype).double(), weight.double())
    blended = maths.blend(ours.to(dtype), theirs.to(dtype), weight)
    assert blended.dtype == dtype
    torch.testing.assert_close(blended, exact.to(dtype))


def test_the_gradient_of_the_weight_is_the_difference_of_the_two():
    ours, theirs, weight = (
        double(3, 4),
        double(3, 4, seed=1),
        torch.tensor(0.4, dtype=torch.float64, requires_grad=True),
    )
    maths.blend(ours, theirs, weight).sum().backward()
    torch.testing.assert_close(weight.grad, (ours - theirs).sum())


def test_between_levels_lies_on_the_straight_line():
    x, x_next = double(1, 4, 3, 3), double(1, 4, 3, 3, seed=1)
    torch.testing.assert_close(maths.between_levels(x, x_next, 3.0, 1.0, 3.0), x)
    torch.testing.assert_close(maths.between_levels(x, x_next, 3.0, 1.0, 1.0), x_next)
    torch.testing.assert_close(maths.between_levels(x, x_next, 3.0, 1.0, 2.5), 0.75 * x + 0.25 * x_next)
    with pytest.raises(ValueError, match="both latents are at sigma 2"):
        maths.between_levels(x, x_next, 2.0, 2.0, 2.0)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(14.6, 11.2), (1.0, 0.3), (0.03, 0.0)])
def test_an_euler_step_with_the_straight_lines_picture_lands_on_the_next_latent(sigma, sigma_next):
    x, x_next = double(2, 4, 5, 3), double(2, 4, 5, 3, seed=1)
    denoised = maths.straight_line_denoised(x, x_next, sigma, sigma_next)
    torch.testing.assert_close(ddim_step(x, denoised, sigma, sigma_next), x_next)


def test_at_the_last_step_the_straight_line_ends_at_the_picture_itself():
    x, x_next = double(1, 4, 2, 2), double(1, 4, 2, 2, seed=1)
    assert torch.equal(maths.straight_line_denoised(x, x_next, 0.5, 0.0), x_next)


def test_the_tuning_losses_are_one_and_zero_at_their_ends():
    source, edit, white = double(2, 4, 6, 5), double(2, 4, 6, 5, seed=1), torch.ones(1, 1, 6, 5)
    mask = torch.zeros(2, 1, 6, 5)
    mask[:, :, :3] = 1
    for outside, inside in ((white, white), (1 - mask, mask)):
        of_edit, of_source = (maths.tuning_losses(d, source, edit, outside, inside) for d in (edit, source))
        assert [round(float(loss), 6) for loss in (*of_edit, *of_source)] == [1, 0, 0, 1]


def test_the_tuning_losses_look_where_they_are_told():
    source, edit, mask = torch.zeros(1, 1, 1, 2), torch.tensor([[[[2.0, 2.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    rebuilt, kept = maths.tuning_losses(torch.tensor([[[[1.5, 1.0]]]]), source, edit, 1 - mask, mask)
    assert (float(rebuilt), float(kept)) == (0.25, 0.0625)


def test_where_edit_and_source_agree_the_tuning_losses_stay_finite():
    same, white = torch.ones(1, 4, 2, 2), torch.ones(1, 1, 2, 2)
    assert maths.tuning_losses(same, same, same, white, white) == (0, 0)


def test_the_hinge_game_by_hand():
    assert maths.discriminator_loss(torch.tensor([0.5, 2.0]), torch.tensor([-2.0, 1.0])).item() == 0.25 + 1.0
    assert maths.generator_loss(torch.tensor([0.5, 1.5])).item() == -1.0


def test_departure_is_a_root_mean_square_over_the_region_of_each_picture():
    path, x = torch.zeros(1, 2, 1, 3), torch.zeros(2, 2, 1, 3)
    x[0, 0, 0, 0], x[1, :, 0, 2] = 3.0, 100.0
    weight = torch.tensor([1.0, 0.5, 0.0]).view(1, 1, 1, 3)
    expected = torch.tensor([(9 / 2 / 1.5) ** 0.5, 0.0])
    torch.testing.assert_close(maths.departure(x, path, weight), expected)
    torch.testing.assert_close(maths.departure(x.half(), path.half(), weight.half()), expected, rtol=1e-3, atol=1e-3)
    assert maths.departure(x, path, torch.zeros(1, 1, 1, 3)).tolist() == [0.0, 0.0]


def test_a_quarter_of_the_noise_or_of_the_way_is_allowed():
    assert maths.farthest_departure(8.0, 8.0) == 2.0
    assert maths.farthest_departure(1.0, 9.0) == 2.0
    assert maths.farthest_departure(0.0, 0.4) == pytest.approx(0.1)


def test_the_loss_of_a_pair_is_0_at_the_edited_picture_and_1_at_the_source():
    edited, source = torch.randn(2, 2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    assert float(maths.pair_loss(edited, edited, source)) == 0
    torch.testing.assert_close(maths.pair_loss(source, edited, source), torch.tensor(1.0))
    torch.testing.assert_close(maths.pair_loss((source + edited) / 2, edited, source), torch.tensor(0.25))
    one = torch.stack([edited[0], source[1]])  # of two pairs one is right
    torch.testing.assert_close(maths.pair_loss(one.half(), edited, source), torch.tensor(0.5), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(maths.pair_loss(source, edited, edited))
