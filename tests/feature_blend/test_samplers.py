"""Feature Blend at its defaults under every sampler of the host: features act where the latent is on their path."""

import logging

import comfy.samplers
import pytest
import tiny_models
import torch
from feature_blend.blending import beside, calls, differs, edits, half, invert, original, sample
from palimpsest.kernels import feature_blend as maths
from palimpsest.nodes.feature_blend.nodes import FeatureBlend

STEPS = 8


@pytest.fixture(scope="module")
def source():
    """(model, trajectory, inverted noise)."""
    with torch.inference_mode():
        model = tiny_models.unet()
        return model, *invert(model, tiny_models.latent(), original(), steps=STEPS)


def at_defaults(model, trajectory, **settings):
    inputs = {"model": model, "trajectory": trajectory, "positive": original()}
    return tiny_models.execute(FeatureBlend, **inputs, **settings)[0]


def off_the_source(model, trajectory, latent):
    """How far the outside of the mask is from the source, in the model's scale."""
    end, outside = model.model.process_latent_in(latent), 1 - half(8)[:, None]
    return float(maths.departure(end, trajectory.latents[-1], outside).max())


@pytest.mark.parametrize("random", [False, True], ids=["inverted noise", "random noise"])
@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_with_every_sampler_the_outside_comes_back(source, sampler, random):
    model, trajectory, noise = source
    picture = sample(at_defaults(model, trajectory, mask=half()), noise, steps=STEPS, sampler=sampler, random=random)
    assert torch.isfinite(picture).all()
    assert off_the_source(model, trajectory, picture) < maths.farthest_departure(0.0, 1.0)
    assert differs(picture[..., :4], trajectory.latents[-1][..., :4])


@pytest.mark.parametrize(("sampler", "words"), [("euler", []), ("dpmpp_2m", []), ("euler_ancestral", ["stays held"])])
def test_where_the_latent_is_held_longer_it_is_said_once(source, caplog, sampler, words):
    model, trajectory, noise = source
    patched = at_defaults(model, trajectory, mask=half())
    with caplog.at_level(logging.WARNING):
        sample(patched, noise, steps=STEPS, sampler=sampler)
    said = [record.getMessage() for record in caplog.records if "[palimpsest]" in record.getMessage()]
    assert len(said) == len(words) and all(word in text for word, text in zip(words, said, strict=True))


def test_held_until_the_end_of_the_features_and_no_longer(source):
    model, trajectory, noise = source
    held = [
        sample(at_defaults(model, trajectory, mask=half(), **chosen), noise, steps=STEPS, sampler="euler_ancestral")
        for chosen in (
            {"blend_latents_until": 0.3},
            {"blend_latents_until": 1.0},
            {"blend_latents_until": 0.3, "end_percent": 0.3},
        )
    ]
    torch.testing.assert_close(held[0], held[1], rtol=1e-4, atol=1e-3)
    assert differs(held[2], held[1])


@pytest.mark.parametrize("settings", [{"preset": "paper"}, {"alpha_inside": 0.5, "blend_latents_until": 0.0}])
@pytest.mark.parametrize("features", ["cached", "same step"])
def test_features_end_where_nothing_holds_the_latent_on_the_path(source, caplog, settings, features):
    model, trajectory, noise = source
    patched = at_defaults(model, trajectory, source_features=features, **settings)
    with caplog.at_level(logging.WARNING):
        from_random = sample(patched, noise, steps=STEPS, random=True)
    assert torch.equal(from_random, sample(model, noise, steps=STEPS, random=True))
    assert "the source's features act no more" in caplog.text
    assert differs(sample(patched, noise, steps=STEPS), sample(model, noise, steps=STEPS))


def test_an_inside_that_left_the_path_leaves_the_outside_blended(source, caplog):
    model, trajectory, noise = source
    tied = at_defaults(model, trajectory, mask=half(), alpha_inside=0.8, layers="output 2")
    free = at_defaults(model, trajectory, mask=half(), layers="output 2")
    with caplog.at_level(logging.WARNING):
        pictures = [sample(each, noise, steps=STEPS, random=True) for each in (tied, free)]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    assert "act no more inside of the mask" in caplog.text
    assert differs(sample(tied, noise, steps=STEPS), sample(free, noise, steps=STEPS))


def test_each_run_looks_anew(source):
    model, trajectory, noise = source
    patched = at_defaults(model, trajectory, preset="paper")
    before = sample(patched, noise, steps=STEPS)
    sample(patched, noise, steps=STEPS, random=True)
    assert torch.equal(sample(patched, noise, steps=STEPS), before)


def test_a_latent_off_the_path_by_less_than_its_noise_is_blended(source):
    model, trajectory, _ = source
    patched = at_defaults(model, trajectory, preset="paper")
    near, sigma = beside(trajectory, 2), trajectory.sigmas[2]
    assert differs(calls(patched, near, sigma, *edits()), calls(model, near, sigma, *edits()))
    far = near + sigma * torch.randn(near.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(calls(patched, far, sigma, *edits()), calls(model, far, sigma, *edits()))
