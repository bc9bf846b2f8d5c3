"""How the latent is held to the source outside of the mask, and PFB-Diff's released code."""

import comfy.samplers
import pytest
import tiny_models
import torch
from feature_blend.blending import (
    BLACK,
    GUIDANCE,
    LATENTS,
    STEPS,
    SeenInputs,
    blend,
    calls,
    differs,
    edits,
    half,
    original,
    sample,
    walked,
)
from palimpsest.kernels.ddim import rescale_to_level
from palimpsest.nodes.feature_blend import apply as feature_apply
from palimpsest.nodes.feature_blend.latents import SOURCE_LATENTS

# ---- latents


@pytest.mark.parametrize("random", [False, True], ids=["inverted noise", "random noise"])
@pytest.mark.parametrize("source_latents", ["trajectory", "re-noised source"])
def test_outside_of_the_mask_every_euler_step_lands_on_the_sources_next_latent(inverted, plain, random, source_latents):
    model, trajectory, noise = inverted
    patched = blend(model, trajectory, source_latents=source_latents, seed=4, **LATENTS)
    path = SOURCE_LATENTS[source_latents](trajectory, 4)
    latents = walked(patched, noise, random=random)
    assert len(latents) == STEPS + 1
    for ours, theirs in zip(latents, path.latents, strict=True):
        torch.testing.assert_close(ours[BLACK], theirs[BLACK], rtol=1e-4, atol=2e-4)
    assert differs(latents[-1][..., :4], path.latents[-1][..., :4])


def test_after_its_share_of_the_sampling_the_latent_is_free(inverted):
    model, trajectory, noise = inverted
    latents = walked(blend(model, trajectory, **LATENTS | {"blend_latents_until": 0.3}), noise)
    torch.testing.assert_close(latents[1][BLACK], trajectory.latents[1][BLACK], rtol=1e-4, atol=2e-4)
    assert differs(latents[-1][BLACK], trajectory.latents[-1][BLACK])


def test_the_model_is_shown_the_source_outside(inverted):
    model, trajectory, _ = inverted
    x, seen = tiny_models.latent(seed=5)["samples"], []
    patched = blend(model, trajectory, **LATENTS)
    patched.add_wrapper_with_key(
        "apply_model", "test", lambda run, x, *args, **kw: (seen.append(x), run(x, *args, **kw))[1]
    )
    calls(patched, x, trajectory.sigmas[1], *edits(), GUIDANCE)
    for row in seen[-1]:
        assert torch.equal(row[BLACK], trajectory.latents[1][0][BLACK])
        assert torch.equal(row[..., :4], x[0][..., :4])


@pytest.mark.parametrize(
    "sampler",
    ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "euler_ancestral", "lms", "uni_pc", "ddim", "lcm", "dpmpp_3m_sde"],
)
@pytest.mark.parametrize("random", [False, True], ids=["inverted noise", "random noise"])
def test_whatever_the_sampler_the_latent_ends_as_the_sources(inverted, sampler, random):
    if sampler not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip(f"this host has no {sampler}")
    model, trajectory, noise = inverted
    end = model.model.process_latent_in(
        sample(blend(model, trajectory, **LATENTS), noise, sampler=sampler, random=random)
    )
    torch.testing.assert_close(end[BLACK], trajectory.latents[-1][BLACK], rtol=1e-3, atol=2e-3)
    assert torch.isfinite(end).all()


def test_the_hosts_own_inpainting_mask_wins_where_it_is_black(inverted):
    model, trajectory, _ = inverted
    picture = tiny_models.latent(seed=6)["samples"]
    top = torch.zeros(1, 1, 8, 8)
    top[..., :4, :] = 1
    both = sample(blend(model, trajectory, **LATENTS), picture, random=True, denoise_mask=top)
    torch.testing.assert_close(both[..., 4:, :], picture[..., 4:, :], rtol=1e-4, atol=1e-4)
    end = model.model.process_latent_in(both)
    torch.testing.assert_close(end[..., :4, 4:], trajectory.latents[-1][..., :4, 4:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cells", [2, -2])
def test_a_mask_grows_and_shrinks_by_cells_of_the_latent(inverted, cells):
    mask = feature_apply.grown(half(64), cells, (8, 8))
    assert mask.shape == (1, 64, 64)
    assert mask[0, 0].sum() == 32 + cells * 8


@pytest.mark.parametrize("cells", [0.5, 1.0, 2.25, 9.0, -0.5, -1.0, -2.25, -9.0])
def test_growing_takes_the_maximum_of_a_square(cells):
    mask = torch.rand(2, 19, 33, generator=torch.Generator().manual_seed(0))
    mask = mask.where(mask > 0.7, torch.zeros(()))
    radius = round(abs(cells) * 33 / 8)
    white = mask if cells > 0 else 1 - mask
    square = torch.nn.functional.max_pool2d(white[:, None], 2 * radius + 1, 1, radius)[:, 0]
    assert torch.equal(feature_apply.grown(mask, cells, (5, 8)), square if cells > 0 else 1 - square)


# ---- the released code


def test_released_code_blends_the_middle_with_what_the_middle_returned(inverted):
    model, trajectory, _ = inverted
    patched = blend(model, trajectory, layers="middle", alpha_inside=0.25, released_code=True)
    x, sigma = tiny_models.latent(seed=5)["samples"], trajectory.sigmas[1]
    with SeenInputs(model) as looked:
        calls(model, trajectory.latents[1], sigma, original())
        calls(model, x, sigma, *edits(), GUIDANCE)
        calls(patched, x, sigma, *edits(), GUIDANCE)
    source, untouched, blended = (looked.passes()[i] for i in (0, 1, -1))
    returned = source["output", 0][:, : untouched["middle", 0].shape[1]]
    expected = torch.lerp(returned, untouched["middle", 0], 0.25)
    torch.testing.assert_close(blended["middle", 0], expected, rtol=1e-4, atol=1e-5)


def test_released_code_holds_the_level_just_left_and_begins_one_level_late(inverted):
    model, trajectory, noise = inverted
    found = []
    patched = blend(model, trajectory, released_code=True, **LATENTS)
    sample(patched, noise, callback=lambda step, denoised, x, total: found.append(x.clone()))
    levels, latents = trajectory.sigmas, trajectory.latents
    assert len(found) == STEPS - 1
    torch.testing.assert_close(found[0], rescale_to_level(latents[0], *levels[:2]), rtol=1e-4, atol=1e-4)
    left = rescale_to_level(latents[1], *levels[1:3])
    torch.testing.assert_close(found[1][BLACK], left[BLACK], rtol=1e-4, atol=1e-4)


def test_released_code_leaves_a_start_from_random_noise_at_its_level(inverted):
    model, trajectory, noise = inverted
    found = []
    patched = blend(model, trajectory, released_code=True, **LATENTS)
    sample(patched, noise, random=True, callback=lambda step, denoised, x, total: found.append(x.clone()))
    assert len(found) == STEPS
