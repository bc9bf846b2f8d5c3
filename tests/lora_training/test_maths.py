"""kernels/lora.py against its equations by hand."""

import math

import pytest
import torch
from palimpsest.kernels import denoising_loss
from palimpsest.kernels.lora import (
    COSINE,
    DEBIASED,
    EVEN,
    LINEAR,
    PICTURE,
    level_weight,
    low_rank_sum,
    min_snr_weight,
    rate_share,
    with_offset,
)


def test_the_sum_by_hand():
    weight, up, down = torch.eye(2), torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(low_rank_sum(weight, up, down, 0.5), torch.tensor([[2.5, 2.0], [3.0, 5.0]]))


def test_a_convolution_keeps_its_shape_and_dtype_and_is_rounded_once():
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 3, 3, generator=drawn).half()
    up, down = torch.randn(5, 2, generator=drawn), torch.randn(2, 27, generator=drawn)
    found = low_rank_sum(weight, up, down, 0.25)
    wanted = (weight.double() + 0.25 * (up.double() @ down.double()).view(5, 3, 3, 3)).half()
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_up_of_zero_changes_nothing():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(low_rank_sum(weight, torch.zeros(4, 2), torch.ones(2, 6), 1.0), weight)


def test_min_snr_by_hand():
    sigma = torch.tensor([0.1, 1.0, 10.0])  # SNR 100, 1, .01
    torch.testing.assert_close(min_snr_weight(sigma, 5.0), torch.tensor([0.05, 1.0, 1.0]))
    torch.testing.assert_close(min_snr_weight(sigma, 5.0, velocity=True), torch.tensor([5 / 101, 0.5, 0.01 / 1.01]))
    torch.testing.assert_close(min_snr_weight(sigma, 0.0, velocity=True), torch.ones(3))


@pytest.mark.parametrize("velocity", [False, True])
def test_levels_weigh_as_the_equations_say(velocity):
    """With a = sqrt(alpha_bar): x_t = a x_0 + sqrt(1 - a^2) eps, SNR = a^2 / (1 - a^2), in float64."""
    drawn = torch.Generator().manual_seed(2)
    clean, noise, wrong = (torch.randn(3, 2, 4, 4, generator=drawn, dtype=torch.float64) for _ in range(3))
    bar = torch.tensor([0.999, 0.5, 0.0047], dtype=torch.float64)
    a, b = (part.sqrt()[:, None, None, None] for part in (bar, 1 - bar))
    noised, asked = a * clean + b * noise, noise + 0.1 * wrong  # what a network answers for eps
    picture = (noised - b * asked) / a  # its x_0
    errors = [(difference**2).mean((1, 2, 3)) for difference in (asked - noise, picture - clean)]
    sigma = ((1 - bar) / bar).sqrt()
    loss = denoising_loss.velocity_loss if velocity else denoising_loss.noise_loss
    found = {kind: level_weight(sigma, kind, velocity) * loss(picture, clean, sigma) for kind in (DEBIASED, PICTURE)}
    torch.testing.assert_close(found[DEBIASED].double(), errors[0] / (bar / (1 - bar)).sqrt(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[PICTURE].double(), errors[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(level_weight(sigma, EVEN, velocity), torch.ones(3))


def test_offset_is_one_number_for_a_channel():
    noise, draws = torch.zeros(2, 3, 4, 5), torch.arange(6.0).view(2, 3)
    assert torch.equal(with_offset(noise, draws, 0.5)[1, 2], torch.full((4, 5), 2.5))
    assert torch.equal(with_offset(noise, draws, 0.0), noise)


def test_rates_by_hand():
    cosine = [rate_share(step, 4, schedule=COSINE) for step in range(4)]
    assert cosine == pytest.approx([(1 + math.cos(math.pi * p)) / 2 for p in (0, 0.25, 0.5, 0.75)])
    twice = [rate_share(step, 8, schedule=COSINE, cycles=2) for step in range(8)]
    assert twice == pytest.approx(cosine * 2)
    assert [rate_share(step, 5, schedule=LINEAR, warm_up=1) for step in range(5)] == [0.5, 1.0, 0.75, 0.5, 0.25]


def test_a_mask_weighs_places():
    clean, denoised = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    denoised[..., 0] = 3.0
    where = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]]]])
    assert denoising_loss.picture_error(denoised, clean).item() == 4.5
    assert denoising_loss.picture_error(denoised, clean, where).item() == 9.0
    half = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    assert denoising_loss.picture_error(denoised, clean, half).item() == 4.5
