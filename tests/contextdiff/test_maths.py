"""ContextDiff's equations against each other, against Bayes' rule, and against the stock steps they reduce to."""

import itertools
import math
from functools import partial

import pytest
import torch
from palimpsest.kernels import contextdiff
from palimpsest.kernels.ddim import ddim_step, signal_level

SIGMAS = (14.6, 4.1, 0.9, 0.03)
PAIRS = list(itertools.pairwise(SIGMAS))


def pictures(count, dtype=torch.float64, size=(2, 4, 5, 3)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=dtype) for _ in range(count)]


def level(sigma, dtype=torch.float64):
    return torch.tensor(sigma, dtype=dtype)


def ddim(denoised, sigma, sigma_next):
    return partial(ddim_step, denoised=denoised, sigma=sigma, sigma_next=sigma_next)


def ddpm(denoised, sigma, sigma_next, noise=None):
    return partial(contextdiff.ddpm_step, denoised=denoised, sigma=sigma, sigma_next=sigma_next, noise=noise)


# ---- the schedule of the bias


def test_the_bias_is_largest_at_signal_one_half_and_gone_for_a_clean_picture():
    assert contextdiff.bias_scale(0.5) == 0.25
    assert max(contextdiff.bias_scale(i / 1000) for i in range(1001)) == 0.25
    assert contextdiff.bias_scale(1.0) == contextdiff.bias_scale(0.0) == 0.0


@pytest.mark.parametrize("sigma", [1e-9, *SIGMAS, 4518.0])
def test_the_hosts_bias_is_the_papers_divided_by_the_signal(sigma):
    signal = signal_level(sigma)
    assert contextdiff.bias_level(sigma) == pytest.approx(contextdiff.bias_scale(signal) / signal, rel=1e-9, abs=1e-16)
    assert contextdiff.bias_level(sigma) == pytest.approx(1 - signal, rel=1e-7, abs=1e-16)


def test_the_bias_keeps_its_digits_near_the_clean_picture():
    assert contextdiff.bias_level(1e-9) == pytest.approx(0.5e-18, rel=1e-12)


def test_the_angle_runs_from_clean_to_noise_and_means_the_same_for_flow_levels():
    assert contextdiff.noise_angle(0.0) == contextdiff.flow_noise_angle(0.0) == 0.0
    assert contextdiff.flow_noise_angle(1.0) == 1.0
    assert contextdiff.noise_angle(1.0) == pytest.approx(0.5)
    for s in (0.1, 0.5, 0.9):
        assert contextdiff.flow_noise_angle(s) == pytest.approx(contextdiff.noise_angle(s / (1 - s)))


# ---- the forward process


def test_the_forward_process_is_the_same_in_both_variables():
    clean, context, noise = pictures(3)
    for sigma in SIGMAS:
        z = contextdiff.contextual_forward(clean, context, noise, signal_level(sigma))
        x = contextdiff.contextual_noised(clean, contextdiff.bias_level(sigma) * context, noise, sigma)
        torch.testing.assert_close(signal_level(sigma) * x, z, rtol=1e-12, atol=1e-12)


def test_the_transitions_of_equation_2_give_the_marginal_of_equation_1():
    """One linear Gaussian after the other: mean through `transition_mean`, variance by hand."""
    clean, *contexts = pictures(5)
    signals = [1.0, 0.9, 0.6, 0.2]
    mean, variance, before = clean, 0.0, torch.zeros_like(clean)
    for signal_before, signal, context in zip(signals, signals[1:], contexts, strict=False):
        bias = contextdiff.bias_scale(signal) * context
        mean = contextdiff.transition_mean(mean, bias, before, signal, signal_before)
        alpha = (signal / signal_before) ** 2
        variance, before = alpha * variance + 1 - alpha, bias
        torch.testing.assert_close(mean, contextdiff.contextual_forward(clean, context, clean * 0, signal))
        assert variance == pytest.approx(1 - signal**2)


# ---- the posterior


@pytest.mark.parametrize(("signal", "signal_next"), [(0.1, 0.4), (0.6, 0.95)])
def test_the_posterior_is_bayes_rule(signal, signal_next):
    """log q(z_{t-1} | z_t) differs from log q(z_t | z_{t-1}) + log q(z_{t-1}) by a constant in z_{t-1}."""
    clean, context, context_next, z = pictures(4, size=(1, 1, 1, 1))
    bias, bias_next = contextdiff.bias_scale(signal) * context, contextdiff.bias_scale(signal_next) * context_next
    candidates = torch.linspace(-3, 3, 13, dtype=torch.float64)

    def log_normal(value, mean, variance):
        return -((value - mean) ** 2) / (2 * variance)

    posterior = log_normal(
        candidates,
        contextdiff.posterior_mean(z, clean, bias, bias_next, signal, signal_next),
        contextdiff.posterior_variance(signal, signal_next),
    )
    likelihood = log_normal(
        z,
        contextdiff.transition_mean(candidates, bias, bias_next, signal, signal_next),
        1 - (signal / signal_next) ** 2,
    )
    prior = log_normal(candidates, signal_next * clean + bias_next, 1 - signal_next**2)
    difference = posterior - likelihood - prior
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference))


@pytest.mark.parametrize(("sigma", "sigma_next"), PAIRS)
def test_the_posterior_over_noisy_pictures_gives_the_marginal_of_the_next_level(sigma, sigma_next):
    """Integrated by the two moments: exact for Gaussians."""
    clean, context, context_next = pictures(3)
    signal, signal_next = signal_level(sigma), signal_level(sigma_next)
    bias, bias_next = contextdiff.bias_scale(signal) * context, contextdiff.bias_scale(signal_next) * context_next
    centre = contextdiff.contextual_forward(clean, context, clean * 0, signal)

    def mean(z):
        return contextdiff.posterior_mean(z, clean, bias, bias_next, signal, signal_next)

    wanted = contextdiff.contextual_forward(clean, context_next, clean * 0, signal_next)
    torch.testing.assert_close(mean(centre), wanted)
    slope = mean(centre + 1) - mean(centre)
    spread = slope**2 * (1 - signal**2) + contextdiff.posterior_variance(signal, signal_next)
    torch.testing.assert_close(spread, torch.full_like(spread, 1 - signal_next**2))


def test_ddim_with_any_deviation_keeps_the_marginal():
    """What eq. 10 asks for: the mean at the next level is sqrt(abar') x_0 + b', for every s of eq. 9."""
    clean, context, context_next, noise = pictures(4)
    signal, signal_next = 0.3, 0.7
    bias, bias_next = contextdiff.bias_scale(signal) * context, contextdiff.bias_scale(signal_next) * context_next
    z = contextdiff.contextual_forward(clean, context, noise, signal)
    for deviation in (0.0, 0.2, math.sqrt(contextdiff.posterior_variance(signal, signal_next))):
        left = math.sqrt(1 - signal_next**2 - deviation**2)
        stepped = contextdiff.contextual_ddim(z, clean, bias, bias_next, signal, signal_next, deviation)
        torch.testing.assert_close(stepped, signal_next * clean + bias_next + left * noise)


def test_the_ddpm_mean_is_ddim_with_the_posteriors_deviation():
    clean, context, context_next, z = pictures(4)
    biases = contextdiff.bias_scale(0.3) * context, contextdiff.bias_scale(0.7) * context_next
    deviation = math.sqrt(contextdiff.posterior_variance(0.3, 0.7))
    torch.testing.assert_close(
        contextdiff.contextual_ddim(z, clean, *biases, 0.3, 0.7, deviation),
        contextdiff.posterior_mean(z, clean, *biases, 0.3, 0.7),
    )


# ---- the paper's form and the host's


@pytest.mark.parametrize(("sigma", "sigma_next"), [*PAIRS, (0.9, 4.1)])
def test_equation_11_is_the_same_in_both_variables(sigma, sigma_next):
    x, clean, context, context_next = pictures(4)
    biases = [contextdiff.bias_level(s) * r for s, r in ((sigma, context), (sigma_next, context_next))]
    ours = contextdiff.contextual_step(ddim(clean, sigma, sigma_next), x, *biases)
    signal, signal_next = signal_level(sigma), signal_level(sigma_next)
    paper_biases = contextdiff.bias_scale(signal) * context, contextdiff.bias_scale(signal_next) * context_next
    paper = contextdiff.contextual_ddim(signal * x, clean, *paper_biases, signal, signal_next)
    torch.testing.assert_close(signal_next * ours, paper, rtol=1e-12, atol=1e-12)
    by_hand = clean + biases[1] + sigma_next * (x - clean - biases[0]) / sigma
    torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sigma", "sigma_next"), PAIRS)
def test_equation_7_is_the_same_in_both_variables(sigma, sigma_next):
    x, clean, context, context_next, noise = pictures(5)
    biases = [contextdiff.bias_level(s) * r for s, r in ((sigma, context), (sigma_next, context_next))]
    signal, signal_next = signal_level(sigma), signal_level(sigma_next)
    mean = contextdiff.contextual_step(ddpm(clean, level(sigma), level(sigma_next)), x, *biases)
    paper_biases = contextdiff.bias_scale(signal) * context, contextdiff.bias_scale(signal_next) * context_next
    paper = contextdiff.posterior_mean(signal * x, clean, *paper_biases, signal, signal_next)
    torch.testing.assert_close(signal_next * mean, paper, rtol=1e-9, atol=1e-9)
    drawn = contextdiff.contextual_step(ddpm(clean, level(sigma), level(sigma_next), noise), x, *biases)
    deviation = math.sqrt(contextdiff.posterior_variance(signal, signal_next))
    torch.testing.assert_close(signal_next * (drawn - mean), deviation * noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.2, 1.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), PAIRS)
def test_eta_splits_a_level_into_what_is_left_and_what_is_new(sigma, sigma_next, eta):
    down, up = contextdiff.ancestral_levels(level(sigma), level(sigma_next), eta)
    assert down**2 + up**2 == pytest.approx(sigma_next**2)
    deviation = signal_level(sigma_next) * up
    variance = eta**2 * contextdiff.posterior_variance(signal_level(sigma), signal_level(sigma_next))
    assert deviation**2 == pytest.approx(variance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("nothing", [0.0, torch.zeros(())], ids=["no bias", "a bias of zero"])
def test_without_a_bias_every_step_is_the_stock_step_bit_for_bit(dtype, nothing):
    x, clean, noise = pictures(3, dtype)
    for step in (ddim(clean, 4.1, 0.9), ddpm(clean, level(4.1, dtype), level(0.9, dtype), noise)):
        assert torch.equal(contextdiff.contextual_step(step, x, nothing, nothing), step(x))


# ---- inversion


@pytest.mark.parametrize("constant", [True, False], ids=["r without t", "r with t"])
def test_inverting_then_sampling_is_the_identity_for_an_exact_clean_picture(constant):
    x, clean, *contexts = pictures(2 + len(SIGMAS))
    levels = SIGMAS[::-1]
    biases = {
        s: contextdiff.bias_level(s) * contexts[0 if constant else i] for i, s in enumerate(levels)
    }  # fmt: skip
    state = x
    for a, b in [*itertools.pairwise(levels), *PAIRS]:
        state = contextdiff.contextual_step(ddim(clean, a, b), state, biases[a], biases[b])
    torch.testing.assert_close(state, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.9])
def test_the_fixed_point_of_the_climb_is_what_sampling_steps_down_from(sigma):
    """With a clean picture that depends on the latent, and a context that depends on the clean picture."""
    x, context = pictures(2)
    sigma_next, tops = 4.1, contextdiff.bias_level(4.1)

    def clean_of(latent):
        return latent - tops * context - sigma_next * 0.1 * torch.tanh(latent)

    def biases(clean):
        return contextdiff.bias_level(sigma) * (context + 0.1 * torch.tanh(clean)), tops * context

    reached = x
    for _ in range(300):
        clean = clean_of(reached)
        reached = contextdiff.contextual_climb(x, reached, clean, *biases(clean), sigma, sigma_next)
    clean = clean_of(reached)
    bias, bias_next = biases(clean)
    assert (reached - x).abs().max() > 0.1
    torch.testing.assert_close(contextdiff.contextual_step(ddim(clean, sigma_next, sigma), reached, bias_next, bias), x)


# ---- flow matching


def test_the_flow_form_keeps_its_marginal_from_level_to_level():
    clean, context, context_next, noise = pictures(4)

    def marginal(s, r):
        return (1 - s) * clean + contextdiff.flow_bias_level(s) * r + s * noise

    for s, s_next in ((1.0, 0.8), (0.8, 0.3), (0.3, 0.0), (0.3, 0.8)):
        biases = contextdiff.flow_bias_level(s) * context, contextdiff.flow_bias_level(s_next) * context_next
        stepped = contextdiff.contextual_step(ddim(clean, s, s_next), marginal(s, context), *biases)
        torch.testing.assert_close(stepped, marginal(s_next, context_next))


def test_a_flow_step_with_fresh_noise_keeps_the_marginal_too():
    """The mean, and the shares of the old noise and the fresh one, read off a step with each of them alone."""
    clean, context, context_next, noise = pictures(4)
    s, s_next, eta = (torch.tensor(value, dtype=torch.float64) for value in (0.8, 0.5, 0.7))
    biases = contextdiff.flow_bias_level(s) * context, contextdiff.flow_bias_level(s_next) * context_next

    def reached(old, fresh):
        x = (1 - s) * clean + biases[0] + s * old
        step = partial(
            contextdiff.flow_ancestral_step, denoised=clean, sigma=s, sigma_next=s_next, eta=float(eta), noise=fresh
        )
        return contextdiff.contextual_step(step, x, *biases)

    nothing = torch.zeros_like(noise)
    mean = reached(nothing, nothing)
    torch.testing.assert_close(mean, (1 - s_next) * clean + biases[1])
    old, fresh = ((reached(*given) - mean).norm() / noise.norm() for given in ((noise, nothing), (nothing, noise)))
    assert float(old**2 + fresh**2) == pytest.approx(float(s_next**2))
    assert 0.1 < fresh < s_next


def test_the_flow_bias_is_the_papers_k_of_the_flow_signal():
    for s in (0.0, 0.2, 0.5, 1.0):
        assert contextdiff.flow_bias_level(s) == pytest.approx(contextdiff.bias_scale(1 - s))


# ---- training


def test_the_weight_turns_the_loss_of_the_picture_into_that_of_the_noise_up_to_its_limit():
    clean, noise, wrong = pictures(3)
    x = clean + 3.0 * noise
    loss = contextdiff.context_loss(x - 3.0 * wrong, clean, contextdiff.snr_weight(3.0))
    torch.testing.assert_close(loss, (wrong - noise).pow(2).flatten(1).mean(1).float())
    assert contextdiff.snr_weight(0.1) == 5.0


def test_the_released_codes_shift_needs_no_change_in_sampling():
    """Eq. 11 with its bias, 0.018125 sigma r, is the plain step when r does not depend on t."""
    clean, context, noise = pictures(3)
    shifted = contextdiff.shifted_noise(noise, context)
    x = clean + 4.1 * shifted
    torch.testing.assert_close(x - 4.1 * shifted, clean)
    biases = [contextdiff.RELEASED_CODE_SHIFT * s * context for s in (4.1, 0.9)]
    step = ddim(clean, 4.1, 0.9)
    torch.testing.assert_close(contextdiff.contextual_step(step, x, *biases), step(x))


def test_the_loss_of_a_flow_model_is_the_velocitys_loss_where_nothing_limits_it():
    """v = (x - f) / s against (x - x_0) / s, of shifted pictures; the target is eps - x_0 + (1 - s) r."""
    clean, r, noise, off = torch.randn(4, 2, 3, 5, 5, dtype=torch.float64).unbind(0)
    for s in (0.05, 0.5, 0.9, 1.0):
        x = contextdiff.flow_noised(clean, contextdiff.flow_bias_level(s) * r, noise, s)
        target = (x - clean) / s
        torch.testing.assert_close(target, noise - clean + (1 - s) * r)
        denoised = clean + 0.1 * off
        velocity = (x - denoised) / s
        wanted = (velocity - target).pow(2).flatten(1).mean(1)
        found = contextdiff.context_loss(denoised, clean, contextdiff.flow_weight(s, float("inf")))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    assert contextdiff.flow_weight(0.1, 5.0) == 5.0 and contextdiff.flow_weight(1.0, 5.0) == 1.0


def test_noised_pictures_of_a_flow_are_the_stock_ones_without_a_shift():
    clean, noise = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64).unbind(0)
    sigma = torch.tensor([0.25, 1.0], dtype=torch.float64)[:, None, None, None]
    found = contextdiff.flow_noised(clean, 0.0, noise, sigma)
    torch.testing.assert_close(found, (1 - sigma) * clean + sigma * noise)
    assert torch.equal(found[1], noise[1])
