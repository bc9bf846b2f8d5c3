"""DDIM in the host's x against the paper's z, by hand and in float64."""

import math

import pytest
import torch
from palimpsest.kernels.ddim import ddim_step, predicted_noise, rescale_to_level, signal_level


def paper_step(z, eps, abar, abar_next):
    """Eq. 12 of arXiv:2010.02502 at eta = 0, as printed."""
    x0 = (z - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    return math.sqrt(abar_next) * x0 + math.sqrt(1 - abar_next) * eps


def sigma_of(abar):
    return math.sqrt((1 - abar) / abar)


@pytest.mark.parametrize(("abar", "abar_next"), [(0.0047, 0.02), (0.5, 0.7), (0.9, 0.9991), (0.7, 0.3)])
def test_a_step_is_the_papers_step_seen_in_x(abar, abar_next):
    z, eps = torch.randn(2, 2, 4, 5, 7, dtype=torch.float64)
    sigma, sigma_next = sigma_of(abar), sigma_of(abar_next)
    x, x0 = z / math.sqrt(abar), (z - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    stepped = ddim_step(x, x0, sigma, sigma_next) * math.sqrt(abar_next)
    torch.testing.assert_close(stepped, paper_step(z, eps, abar, abar_next), rtol=1e-12, atol=1e-12)


def test_equation_4_of_kv_inversion_holds_with_its_lost_factor():
    abar, abar_next = 0.3, 0.6
    z, eps = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    bracket = math.sqrt(1 / abar_next - 1) - math.sqrt(1 / abar - 1)
    corrected = math.sqrt(abar_next / abar) * z + math.sqrt(abar_next) * bracket * eps
    torch.testing.assert_close(corrected, paper_step(z, eps, abar, abar_next), rtol=1e-12, atol=1e-12)
    as_printed = math.sqrt(abar_next / abar) * z + bracket * eps
    assert (as_printed - corrected).abs().max() > 0.1


def test_a_step_up_and_down_with_the_same_noise_returns():
    x, x0 = torch.randn(2, 1, 4, 5, 3, dtype=torch.float64)
    eps = predicted_noise(x, x0, 2.0)
    up = ddim_step(x, x0, 2.0, 5.0)
    torch.testing.assert_close(ddim_step(up, up - 5.0 * eps, 5.0, 2.0), x)


def test_a_step_to_zero_is_the_denoised_picture():
    x, x0 = torch.randn(2, 1, 4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(ddim_step(x, x0, 0.7, 0.0), x0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_noise_without_a_noise_level_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma must be above 0"):
        predicted_noise(torch.zeros(1), torch.zeros(1), sigma)


def test_signal_level_and_rescaling_keep_z():
    assert signal_level(0.0) == 1.0
    assert signal_level(sigma_of(0.25)) == pytest.approx(0.5)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(rescale_to_level(x, 1.5, 4.0) * signal_level(4.0), x * signal_level(1.5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_stays_near_float64(dtype, tolerance):
    x, x0 = torch.randn(2, 3, 4, 5, 123, dtype=torch.float64)
    exact = ddim_step(x, x0, 3.0, 2.0)
    error = (ddim_step(x.to(dtype), x0.to(dtype), 3.0, 2.0).double() - exact).norm() / exact.norm()
    assert error < tolerance
