"""kernels/lora.py against its equations by hand."""

import math

import pytest
import torch
from palimpsest.kernels import denoising_loss
from palimpsest.kernels.lora import COSINE, LINEAR, low_rank_sum, min_snr_weight, rate_share, with_offset


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
