"""The losses against what a network in eps or v would be compared by, written out."""

import pytest
import torch
from palimpsest.kernels import denoising_loss


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_both_losses_are_the_errors_of_what_the_network_was_asked_for(sigma):
    clean, noise, wrong = torch.randn(3, 2, 4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level, root = torch.tensor([sigma] * 2, dtype=torch.float64), (1 + sigma**2) ** 0.5
    x = clean + sigma * noise
    eps = noise + 0.1 * wrong
    found = denoising_loss.noise_loss(x - sigma * eps, clean, level)
    torch.testing.assert_close(found.double(), (eps - noise).pow(2).flatten(1).mean(1), rtol=1e-4, atol=0)
    velocity = (noise - sigma * clean) / root
    guess = velocity + 0.1 * wrong
    denoised = x / root**2 - guess * sigma / root  # the host's V_PREDICTION
    found = denoising_loss.velocity_loss(denoised, clean, level)
    torch.testing.assert_close(found.double(), (guess - velocity).pow(2).flatten(1).mean(1), rtol=1e-4, atol=0)


def test_a_perfect_guess_costs_nothing_and_half_precision_is_counted_in_float32():
    clean = torch.randn(3, 4, 5, 5).half()
    sigma = torch.tensor([0.1, 1.0, 10.0])
    for loss in (denoising_loss.noise_loss, denoising_loss.velocity_loss):
        assert loss(clean, clean, sigma).tolist() == [0.0] * 3
        assert loss(clean + 1, clean, sigma).dtype == torch.float32


def test_levels_cover_the_schedule_evenly():
    draws = torch.rand(8, generator=torch.Generator().manual_seed(0))
    levels = denoising_loss.spread_levels(draws, torch.arange(8), 8)
    assert [int(level * 8) for level in levels] == list(range(8))
    parts = [denoising_loss.spread_levels(draws[i : i + 4], torch.arange(i, i + 4), 8) for i in (0, 4)]
    assert torch.equal(torch.cat(parts), levels)
