"""Invert Picture on the contextual path: the sampler undoes it, and nodes that look at the source see it there."""

import comfy.samplers
import harness
import pytest
import tiny_models
import torch
from attention_fusion.fusing import SOURCE, WideClip, encoder, fuse
from contextdiff.acting import adapter, flow
from palimpsest.nodes.contextdiff.nodes import ContextSampler
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.inversion.nodes import Invert

STEPS = 6

pytestmark = pytest.mark.usefixtures("inference")


def invert(model, latent, positive, **changes):
    """The node's outputs, without its test reconstruction."""
    inputs = {"model": model, "latent": latent, "positive": positive, "steps": STEPS, "reconstruction_guidance": 0.0}
    return tiny_models.execute(Invert, **inputs | changes)


def sampler(made, **settings):
    return tiny_models.execute(ContextSampler, context_adapter=made, **settings)[0]


def edit(model, positive, sampling, noise, cfg=1.0, sigmas=None):
    """(latent, the states at every level) of a run that begins in inverted noise, as SamplerCustom makes it."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, tiny_models.prompt(2))
    guider.set_cfg(cfg)
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    states = []

    def keep(step, denoised, x, total):
        states.append(x.clone())

    start = noise["samples"]
    last = guider.sample(torch.zeros_like(start), start, sampling, levels, callback=keep, disable_pbar=True, seed=5)
    return last, torch.stack([*states, model.model.process_latent_in(last.clone())])


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("strength", "video"), [(1.0, False), (0.5, True)])
def test_the_sampler_undoes_a_random_adapters_trajectory_to_float_error_at_every_level(strength, video):
    model, latent, positive = tiny_models.unet(), tiny_models.latent(3 if video else 1), tiny_models.prompt(1)
    made = adapter(model, 0.1, video=video)
    wanted = {"context_adapter": made, "context_strength": strength, "context_refinements": 30}
    trajectory, noise, *_ = invert(model, latent, positive, **wanted)
    assert trajectory.contextual
    last, states = edit(model, positive, sampler(made, strength=strength), noise)
    for state, recorded in zip(states, trajectory.latents, strict=True):
        assert relative(state, recorded) < 1e-5
    assert relative(last, latent["samples"]) < 1e-5
    plain = invert(model, latent, positive)[0]
    assert relative(plain.latents[STEPS // 2], trajectory.latents[STEPS // 2]) > 1e-3


def test_without_an_adapter_nothing_changes_and_at_strength_0_it_is_the_stock_sampler_upward():
    model, latent, positive = tiny_models.unet(), tiny_models.latent(), tiny_models.prompt(1)
    plain, noise, *_ = invert(model, latent, positive)
    again, same, *_ = invert(model, latent, positive, context_strength=0.3, context_refinements=0)
    assert not again.contextual
    assert torch.equal(plain.latents, again.latents)
    assert torch.equal(noise["samples"], same["samples"])
    off = {"context_adapter": adapter(model), "context_strength": 0.0, "context_refinements": 0}
    levels = torch.tensor((1e-4, *plain.sigmas[-2::-1]))  # as FlipSigmas gives them
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)
    start, euler = latent["samples"], comfy.samplers.sampler_object("euler")
    stock = guider.sample(torch.zeros_like(start), start, euler, levels, disable_pbar=True, seed=0)
    assert torch.equal(invert(model, latent, positive, **off)[1]["samples"], stock)


def test_the_report_measures_the_way_down_with_the_adapter_and_says_how_to_edit():
    model, latent, positive = tiny_models.unet(), tiny_models.latent(), tiny_models.prompt(1)
    *_, rebuilt, report, _ = invert(
        model, latent, positive, context_adapter=adapter(model, 0.1), reconstruction_guidance=1.0
    )
    assert relative(rebuilt["samples"], latent["samples"]) < 0.05
    assert "edit by the Context-Aware Sampler with the same one, strength 1" in report


def test_attention_fusion_and_feature_blend_see_the_source_where_the_edit_runs():
    """Drawing the source by its own prompt, what they bring in is what is there already, on this path alone."""
    clip: WideClip = encoder("sd15")
    model, latent = tiny_models.unet(), tiny_models.latent()
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(SOURCE))
    made = adapter(model, 0.3)
    ours = sampler(made)
    on, noise, *_ = invert(model, latent, positive, context_adapter=made, context_refinements=30)
    beside = invert(model, latent, positive)[0]
    plain = edit(model, positive, ours, noise)[0]
    shares = {"self_attention_until": 1.0, "cross_attention_until": 1.0, "edit_text": SOURCE}
    blending = {"positive": positive, "mask": torch.zeros(1, 64, 64), "blend_latents_until": 0.0}
    errors = {}
    for name, trajectory in (("on it", on), ("beside it", beside)):
        fused, prompt, _ = fuse(model, clip, trajectory, layers="all", **shares)
        blended = tiny_models.execute(FeatureBlend, model=model, trajectory=trajectory, **blending)[0]
        edits = (fused, prompt), (blended, positive)
        errors[name] = [relative(edit(*each, ours, noise)[0], plain) for each in edits]
    assert errors["on it"][0] < 1e-4 < 1e-3 < errors["beside it"][0]
    assert errors["on it"][1] < 0.1 * errors["beside it"][1]


def test_a_sampler_without_the_adapter_is_told_of():
    model, latent, positive = tiny_models.unet(), tiny_models.latent(), tiny_models.prompt(1)
    made = adapter(model, 0.1)
    trajectory, noise, *_ = invert(model, latent, positive, context_adapter=made)
    output = FeatureBlend.execute(model, trajectory, positive, mask=harness.half())
    said = output.ui["remarks"][0]
    edit(output.args[0], positive, sampler(made), noise)
    assert said == []
    edit(output.args[0], positive, comfy.samplers.sampler_object("euler"), noise)
    assert "inverted with a context adapter and is sampled by euler: connect the Context-Aware" in said[0]["text"]


def test_a_flow_model_is_inverted_too_but_no_part_of_its_schedule():
    model, latent, positive = flow(tiny_models.unet()), tiny_models.latent(), tiny_models.prompt(1)
    given = {"context_adapter": adapter(model, 0.1), "context_refinements": 30, "reconstruction_guidance": 1.0}
    *_, rebuilt, _, _ = invert(model, latent, positive, **given)
    assert relative(rebuilt["samples"], latent["samples"]) < 1e-4
    with pytest.raises(ValueError, match=r"up to pure noise \(sigma 1\), sigmas begin at 0.5: connect all of them"):
        invert(model, latent, positive, sigmas=torch.tensor([0.5, 0.2, 0.0]), **given)


@pytest.mark.parametrize(("scheduler", "said"), [("normal", False), ("ddim_uniform", True)])
def test_levels_that_begin_below_the_noisiest_are_told_to_begin_without_inverted_noise(scheduler, said):
    model, latent, positive = tiny_models.unet(), tiny_models.latent(), tiny_models.prompt(1)
    for given, wanted in (({"context_adapter": adapter(model, 0.1), "context_refinements": 0}, said), ({}, False)):
        report = invert(model, latent, positive, scheduler=scheduler, **given)[3]
        assert ("noise with DisableNoise instead of inverted_noise" in report) is wanted
