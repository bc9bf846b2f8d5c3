"""Which rows are fused with what: prompts, areas, batches, masks, samplers."""

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from attention_fusion.fusing import CACHED, GUIDANCE, acts, empty, fuse, sample, spied
from palimpsest.nodes import host


def test_prompts_of_different_lengths_that_share_a_call(setup):
    """The host repeats the shorter one's tokens; the result is that of a call of its own."""
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory, self_attention_until=1.0, cross_attention_until=1.0)
    long = clip.encode_from_tokens_scheduled(clip.tokenize("bad" + " and" * 90))
    assert long[0][0].shape[1] == 2 * positive[0][0].shape[1]
    together = sample(patched, noise, positive, long)
    apart = patched.clone()

    def one_by_one(args):
        call = args["input"], args["sigma"], args["model_options"]
        return [comfy.samplers.calc_cond_batch(args["model"], [cond], *call)[0] for cond in args["conds"]]

    apart.set_model_sampler_calc_cond_batch_function(one_by_one)
    torch.testing.assert_close(sample(apart, noise, positive, long), together, rtol=1e-4, atol=1e-4)


def test_other_prompts_in_the_same_call_are_left_alone(setup):
    """A call with a second positive prompt: only the edit's rows differ from the plain model's."""
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    other = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    layer = host.self_attention_layers(model)[0]
    seen, theirs = spied(patched, "attn1", layer), model.clone()
    theirs.set_model_attn1_replace(lambda q, k, v, options: host.run_attention(options, None, q, k, v), *layer.key[:2])
    plain = spied(theirs, "attn1", layer)
    sample(patched, noise, positive + other, empty(clip))
    sample(theirs, noise, positive + other, empty(clip))
    a, b = next(found for found in seen if len(found[0]) == 3), plain[0]
    same = [torch.equal(a[3][row], b[3][row]) for row in range(3)]
    assert sorted(same)[1:] == [True, True]


@pytest.mark.parametrize("size", [(8, 8), (11, 9)])
def test_a_prompt_limited_to_an_area_is_fused_on_its_crop(setup, size):
    model, clip, _, trajectory, noise = setup("sd15", 2, *size)
    patched, positive, _ = fuse(model, clip, trajectory, blend_words="dog", self_attention_until=1.0)
    area = [[positive[0][0], positive[0][1] | {"area": (6, 4, 2, 3), "strength": 1.0}]]
    both = area + clip.encode_from_tokens_scheduled(clip.tokenize("a park"))
    assert acts(sample(patched, noise, both, empty(clip)), sample(model, noise, both, empty(clip)))


def test_an_area_of_full_size_is_no_area(setup):
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    whole = [[positive[0][0], positive[0][1] | {"area": (8, 8, 0, 0), "strength": 1.0}]]
    torch.testing.assert_close(
        sample(patched, noise, whole, empty(clip)), sample(patched, noise, positive, empty(clip)), rtol=1e-4, atol=1e-4
    )


def test_a_batch_of_frames_is_fused_frame_by_frame(setup):
    model, clip, _, trajectory, noise = setup("sd15", 3)
    patched, positive, _ = fuse(model, clip, trajectory, blend_words="dog")
    together = sample(patched, noise, positive, empty(clip))
    for i in range(3):
        alone = replace(trajectory, latents=trajectory.latents[:, i : i + 1])
        one, _, _ = fuse(model, clip, alone, blend_words="dog")
        found = sample(one, noise[i : i + 1], positive, empty(clip))
        torch.testing.assert_close(found, together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_one_picture_serves_a_batch(setup):
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    both = sample(patched, noise.expand(2, -1, -1, -1).contiguous(), positive, empty(clip))
    alone = sample(patched, noise, positive, empty(clip))
    torch.testing.assert_close(both, alone.expand_as(both), rtol=1e-4, atol=1e-4)


def test_a_mask_frees_its_white_part(setup):
    model, clip, _, trajectory, noise = setup()
    keep = {"cross_attention_until": 0.0, "self_attention_until": 1.0}
    patched, positive, _ = fuse(model, clip, trajectory, mask=torch.ones(1, 64, 64), **keep)
    plain = sample(model, noise, positive, empty(clip))
    torch.testing.assert_close(sample(patched, noise, positive, empty(clip)), plain, rtol=1e-5, atol=1e-5)
    held, _, _ = fuse(model, clip, trajectory, **keep)
    black, _, _ = fuse(model, clip, trajectory, mask=torch.zeros(64, 64), **keep)
    a, b = (sample(each, noise, positive, empty(clip)) for each in (held, black))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert acts(a, plain)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_other_samplers_and_guidance_1(setup, sampler):
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    for cfg in (1.0, GUIDANCE):
        found = sample(patched, noise, positive, empty(clip), cfg, sampler, 5)
        assert acts(found, sample(model, noise, positive, empty(clip), cfg, sampler, 5))


@pytest.mark.parametrize(("of_self", "of_cross"), [(0.3, 0.8), (0.8, 0.3), (0.0, 0.5), (0.5, 0.0)])
def test_fractions_that_differ_with_other_steps_than_the_inversions(setup, of_self, of_cross):
    """The nearest recorded level may have been recorded without what is still fused at the sampled one."""
    model, clip, _, trajectory, noise = setup()
    until = {"self_attention_until": of_self, "cross_attention_until": of_cross}
    patched, positive, _ = fuse(model, clip, trajectory, source_features=CACHED, **until)
    for steps in (3, 7):
        found = sample(patched, noise, positive, empty(clip), steps=steps)
        assert torch.isfinite(found).all()
        assert not torch.equal(found, sample(model, noise, positive, empty(clip), steps=steps))
