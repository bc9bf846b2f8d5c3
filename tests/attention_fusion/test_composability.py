"""Attention Fusion beside other nodes, and what a run leaves behind."""

import itertools
from dataclasses import replace

import comfy.model_management
import comfy.samplers
import pytest
import tiny_models
import torch
from attention_fusion.fusing import (
    CACHED,
    GUIDANCE,
    SAME_STEP,
    SOURCE,
    STEPS,
    acts,
    empty,
    families,
    fuse,
    sample,
    sources,
    video,
)
from comfy_extras.nodes_custom_sampler import SamplerCustom
from palimpsest.nodes.contextdiff.adapter import ContextAdapter
from palimpsest.nodes.contextdiff.network import AdapterConfig, closed
from palimpsest.nodes.contextdiff.nodes import ContextSampler
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV


@families
def test_video_attention_in_either_order_gives_the_same(setup, family):
    model, clip, _, trajectory, noise = setup(family, 3)
    inside = {maps: fuse(video(model), clip, trajectory, source_features=maps) for maps in (CACHED, SAME_STEP)}
    positive = inside[SAME_STEP][1]
    recorded, beside = (sample(patched, noise, positive, empty(clip)) for patched, *_ in inside.values())
    assert acts(recorded, sample(video(model), noise, positive, empty(clip)))
    torch.testing.assert_close(recorded, beside, rtol=1e-6, atol=1e-6)
    outside = video(fuse(model, clip, trajectory, source_features=SAME_STEP)[0])
    torch.testing.assert_close(sample(outside, noise, positive, empty(clip)), beside, rtol=1e-4, atol=1e-4)


def test_video_attention_behind_recorded_maps_is_refused_with_a_way_out(setup):
    model, clip, _, trajectory, noise = setup("sd15", 3)
    patched, positive, _ = fuse(model, clip, trajectory, source_features=CACHED)
    with pytest.raises(ValueError, match="put it before this node"):
        sample(video(patched), noise, positive, empty(clip))


def test_two_clips_in_one_batch_are_fused_clip_by_clip(setup):
    model, clip, _, trajectory, noise = setup("sd15", 4)
    patched, positive, _ = fuse(video(model, clip_length=2), clip, trajectory)
    together = sample(patched, noise, positive, empty(clip))
    for first in (0, 2):
        part = replace(trajectory, latents=trajectory.latents[:, first : first + 2])
        one, _, _ = fuse(video(model), clip, part)
        found = sample(one, noise[first : first + 2], positive, empty(clip))
        torch.testing.assert_close(found, together[first : first + 2], rtol=1e-4, atol=1e-4)


@families
def test_with_video_attention_and_the_context_aware_sampler(setup, family):
    """Without a bias the picture is the stock sampler's, bit for bit; with one the adapter acts as well."""
    model, clip, _, trajectory, noise = setup(family, 3)
    config = AdapterConfig.for_model(model, tiny_models.SD15["context_dim"], width=32, depth=1, heads=4)
    adapter = ContextAdapter.new(config)
    for name, parameter in adapter.patcher.model.named_parameters():
        if closed(name.removesuffix(".weight")):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    patched, positive, _ = fuse(video(model), clip, trajectory, blend_words="dog")
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)

    def by(strength):
        sampler = tiny_models.execute(ContextSampler, context_adapter=adapter, strength=strength)[0]
        return tiny_models.execute(
            SamplerCustom, model=patched, add_noise=False, noise_seed=0, cfg=GUIDANCE, positive=positive,
            negative=empty(clip), sampler=sampler, sigmas=levels, latent_image={"samples": noise},
        )[0]["samples"]  # fmt: skip

    stock = sample(patched, noise, positive, empty(clip))
    assert torch.equal(by(0.0), stock)
    assert acts(by(1.0), stock)


def test_beside_kv_inversion_a_word_mask_and_feature_blending(setup):
    model, clip, _, trajectory, noise = setup()
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize(SOURCE))
    kv = tiny_models.execute(
        TuneKV, model=model, trajectory=trajectory, positive=prompt, negative=empty(clip), guidance=GUIDANCE,
        inner_steps=2,
    )[0]  # fmt: skip
    partners = {
        "kv": lambda m: tiny_models.execute(ApplyKV, model=m, kv=kv, source_guidance=4.0)[0],
        "mask": lambda m: tiny_models.execute(CrossAttentionMask, model=m, mask=torch.ones(1, 64, 64).tril())[0],
        "blend": lambda m: tiny_models.execute(
            FeatureBlend, model=m, trajectory=trajectory, positive=prompt, mask=torch.ones(1, 64, 64).tril()
        )[0],
    }
    for partner in partners.values():
        theirs = partner(model)
        patched, positive, _ = fuse(theirs, clip, trajectory, source_features=SAME_STEP)
        both = sample(patched, noise, positive, empty(clip))
        assert acts(both, sample(theirs, noise, positive, empty(clip)))
        assert acts(both, sample(fuse(model, clip, trajectory)[0], noise, positive, empty(clip)))


def test_feature_blend_behind_it_records_the_source_as_it_is(setup):
    """Neither acts in the other's pass of the source."""
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize(SOURCE))
    inputs = {"model": patched, "trajectory": trajectory, "positive": prompt, "mask": torch.ones(1, 64, 64).tril()}
    found = [
        sample(tiny_models.execute(FeatureBlend, source_features=each, **inputs)[0], noise, positive, empty(clip))
        for each in (CACHED, SAME_STEP)
    ]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert acts(found[0], sample(patched, noise, positive, empty(clip)))


def test_two_fusions_after_one_another(setup):
    model, clip, _, trajectory, noise = setup()
    once, positive, _ = fuse(model, clip, trajectory, layers="decoder", self_attention_until=1.0)
    for source_features in (CACHED, SAME_STEP):
        twice, positive, _ = fuse(
            once, clip, trajectory, layers="decoder", self_attention_until=1.0, source_features=source_features
        )
        assert torch.isfinite(sample(twice, noise, positive, empty(clip))).all()


def test_nothing_of_a_run_is_left_behind(setup):
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    before = set(patched.model_options["transformer_options"])
    first = sample(patched, noise, positive, empty(clip))
    assert set(patched.model_options["transformer_options"]) == before
    assert torch.equal(sample(patched, noise, positive, empty(clip)), first)


@sources
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_cancelling_and_errors_leave_nothing_behind(setup, source_features, error):
    model, clip, _, trajectory, noise = setup("sd15", 3)
    patched, positive, _ = fuse(video(model), clip, trajectory, source_features=source_features)
    before, plain = sample(patched, noise, positive, empty(clip)), sample(model, noise, positive, empty(clip))
    kept, broken, count = set(patched.model_options["transformer_options"]), patched.clone(), itertools.count()

    def stop(args):
        if next(count) == 1:
            raise error
        return args["denoised"]

    broken.set_model_sampler_post_cfg_function(stop)
    with pytest.raises(error):
        sample(broken, noise, positive, empty(clip))
    assert set(broken.model_options["transformer_options"]) == kept
    assert torch.equal(sample(patched, noise, positive, empty(clip)), before)
    assert torch.equal(sample(model, noise, positive, empty(clip)), plain)


def test_cancelling_while_the_source_is_recorded_leaves_the_model_as_it_was(setup):
    model, clip, _, trajectory, noise = setup()
    positive = empty(clip)
    plain = sample(model, noise, positive, positive)
    broken = model.clone()

    def stop(apply_model, args):  # in the network's own call: guidance is left out of a recording
        raise comfy.model_management.InterruptProcessingException

    broken.set_model_unet_function_wrapper(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        fuse(broken, clip, trajectory, source_features=CACHED)
    assert torch.equal(sample(model, noise, positive, positive), plain)
