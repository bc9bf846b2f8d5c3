"""A U-Net that samples as a flow (SDXL trained on flow matching): the nodes that look at a source go its way, too."""

import comfy.samplers
import pytest
import tiny_models
import torch
from comfy_extras import nodes_custom_sampler, nodes_model_advanced
from harness import assert_acts, assert_close, half
from palimpsest.nodes import host
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV

STEPS = 8


def flowing():
    """The tiny U-Net with the sampling of SD 3, as ModelSamplingSD3 gives it."""
    return nodes_model_advanced.ModelSamplingSD3().patch(tiny_models.unet(prediction="V_PREDICTION"), 3.0)[0]


def inverted(model):
    given = {"positive": tiny_models.prompt(1), "steps": STEPS, "scheduler": "simple"}
    return tiny_models.execute(Invert, model=model, latent=tiny_models.latent(), **given)


def sampled(model, noise, trajectory, prompt=3, cfg=1.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_models.prompt(prompt), tiny_models.prompt(2))
    guider.set_cfg(cfg)
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor(trajectory.sigmas)
    run = nodes_custom_sampler.SamplerCustomAdvanced.execute(noise, guider, euler, sigmas, tiny_models.latent())
    return run.args[0]["samples"]


def test_it_is_inverted_as_a_flow(inference):
    model = flowing()
    trajectory, _, rebuilt, report, noise = inverted(model)
    assert trajectory.flow
    assert "inverted_noise" in report
    assert_close(sampled(model, noise, trajectory, prompt=1), rebuilt["samples"])
    clean, fresh = trajectory.latents[-1], host.renoised(trajectory, 4).latents
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    for sigma, latent in zip(trajectory.sigmas, fresh, strict=True):
        assert_close(latent, (1 - sigma) * clean + sigma * drawn, 1e-6)


def test_feature_blend_holds_the_picture_outside_of_the_mask(inference):
    model = flowing()
    trajectory, *_, noise = inverted(model)
    given = {"trajectory": trajectory, "positive": tiny_models.prompt(1), "mask": half()}
    patched, *_ = tiny_models.execute(FeatureBlend, model=model, blend_latents_until=1.0, **given)
    edited, plain = (sampled(each, noise, trajectory) for each in (patched, model))
    source = tiny_models.latent()["samples"]
    assert_close(edited[..., 4:], source[..., 4:], 1e-3)
    assert_acts(edited[..., :4], source[..., :4])
    assert_acts(plain[..., 4:], source[..., 4:], 1e-2)
    fresh = nodes_custom_sampler.Noise_RandomNoise(1)
    assert_close(sampled(patched, fresh, trajectory)[..., 4:], source[..., 4:], 1e-3)
    with pytest.raises(ValueError, match=r"released_code.*flow-matching one: turn it off"):
        tiny_models.execute(FeatureBlend, model=model, released_code=True, **given)


def test_tuned_kv_rebuilds_the_picture_at_guidance():
    model = flowing()
    with torch.inference_mode():
        trajectory, *_, noise = inverted(model)
    given = {"positive": tiny_models.prompt(1), "negative": tiny_models.prompt(2)}
    brief = {"guidance": 3.0, "inner_steps": 8, "tolerance": 0.0}
    kv, *_ = tiny_models.execute(TuneKV, model=model, trajectory=trajectory, **given, **brief)
    patched, *_ = tiny_models.execute(ApplyKV, model=model, kv=kv, mode="frozen", source_guidance=1.0)
    source = tiny_models.latent()["samples"]
    with torch.inference_mode():
        tuned, plain = (sampled(each, noise, trajectory, prompt=1, cfg=3.0) for each in (patched, model))
    assert (tuned - source).norm() < 0.7 * (plain - source).norm()


def test_a_run_that_begins_elsewhere_is_told(inference, caplog):
    model = flowing()
    trajectory, *_, noise = inverted(model)
    recorded = host.Recorded.of(trajectory, "the source is a straight line", exact=False)
    watched = model.clone()
    host.compare_runs(watched, recorded, host.UNHEARD)
    sampled(watched, noise, trajectory)
    assert not caplog.messages
    sampled(watched, nodes_custom_sampler.Noise_RandomNoise(1), trajectory)
    assert "connect inverted_noise of Invert Picture to SamplerCustomAdvanced" in caplog.text
