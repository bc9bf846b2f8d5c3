"""Feature Blend with other families of models, and beside the patches of other packs."""

import comfy.sd
import harness
import pytest
import tiny_models
import torch
from feature_blend.blending import (
    BLACK,
    EVERYTHING,
    GUIDANCE,
    beside,
    blend,
    calls,
    differs,
    edits,
    half,
    invert,
    original,
    sample,
    source_of,
    walked,
    with_controlnet,
)
from palimpsest.nodes.feature_blend.blend import Recording


@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION"])
def test_every_prediction_type_walks_the_source_outside(prediction):
    model = tiny_models.unet(prediction=prediction)
    trajectory, noise = invert(model, tiny_models.latent(), original())
    latents = walked(blend(model, trajectory, layers=EVERYTHING, mask=half(), blend_latents_until=1.0), noise)
    for ours, theirs in zip(latents, trajectory.latents, strict=True):
        torch.testing.assert_close(ours[BLACK], theirs[BLACK], rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("family", ["sd15-instruct", "sd15-inpaint", "sdxl-inpaint"])
def test_models_that_look_at_a_picture_show_the_same_one_to_the_source(family):
    model, prompt = tiny_models.unet(family), original(family)
    seen = {"concat_latent_image": tiny_models.latent(seed=8)["samples"]}
    if "inpaint" in family:
        seen["concat_mask"] = half()[:, None]
    shown = [[tensor, extra | seen] for tensor, extra in prompt]
    positive, negative = ([[tensor, extra | seen] for tensor, extra in p] for p in edits(family))
    trajectory, _ = invert(model, tiny_models.latent(), shown)
    x, sigma = beside(trajectory, 0), trajectory.sigmas[0]
    expected = trajectory.latents[0] - calls(model, trajectory.latents[0], sigma, shown)
    for source, features in ((prompt, "auto"), (shown, "same step"), (shown, "cached")):
        patched = blend(model, trajectory, source, layers=EVERYTHING, alpha_inside=0.0, source_features=features)
        noise = x - calls(patched, x, sigma, positive, negative, GUIDANCE)
        torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="need its pictures on the source prompt"):
        blend(model, trajectory, prompt, alpha_inside=0.0, source_features="cached")


def test_the_source_is_run_without_the_edits_controlnet(inverted, plain):
    model, trajectory, noise = inverted
    both = with_controlnet(*edits())
    settings = {"layers": EVERYTHING, "mask": half()}
    pictures = [
        sample(blend(model, trajectory, source_features=features, **settings), noise, *both)
        for features in ("cached", "same step")
    ]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    assert differs(pictures[0], sample(blend(model, trajectory, **settings), noise))
    source, _ = with_controlnet(original(), original())
    for features in ("cached", "same step"):  # one on the source's prompt is left out
        picture = sample(blend(model, trajectory, source, source_features=features, **settings), noise, *both)
        torch.testing.assert_close(picture, pictures[0], rtol=1e-4, atol=1e-4)


def scale_features(h, skip, options):
    """What FreeU does, in place."""
    h[:, : h.shape[1] // 2] *= 1.4
    return h, skip * 0.8


def scale_input(h, options):
    return h * 1.1


def test_block_patches_of_other_packs_act_before_and_after(inverted, plain):
    model, trajectory, noise = inverted
    settings = {"layers": EVERYTHING, "alpha_inside": 0.5, "source_features": "same step"}

    def theirs(model):
        patched = model.clone()
        patched.set_model_output_block_patch(scale_features)
        patched.set_model_input_block_patch_after_skip(scale_input)
        return patched

    alone, ours = sample(theirs(model), noise), sample(blend(model, trajectory, **settings), noise)
    for both in (blend(theirs(model), trajectory, **settings), theirs(blend(model, trajectory, **settings))):
        picture = sample(both, noise)
        assert differs(picture, alone) and differs(picture, ours)
    assert torch.equal(sample(model, noise), plain)


@pytest.mark.parametrize("ours_last", [True, False])
def test_a_lora_on_the_model_acts_though_the_end_is_replaced(inverted, plain, ours_last):
    model, trajectory, noise = inverted
    lora = tiny_models.lora(model)
    generator = torch.Generator().manual_seed(3)
    lora |= {
        "diffusion_model.out.2.lora_up.weight": torch.randn(4, 2, 1, 1, generator=generator),
        "diffusion_model.out.2.lora_down.weight": torch.randn(2, 32, 3, 3, generator=generator) * 0.1,
    }
    settings = {"layers": EVERYTHING, "alpha_inside": 0.5, "source_features": "same step"}

    def theirs(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]

    both = sample(
        blend(theirs(model), trajectory, **settings) if ours_last else theirs(blend(model, trajectory, **settings)),
        noise,
    )
    other = sample(
        theirs(blend(model, trajectory, **settings)) if ours_last else blend(theirs(model), trajectory, **settings),
        noise,
    )
    assert torch.equal(both, other)
    assert differs(both, sample(theirs(model), noise)) and differs(
        both, sample(blend(model, trajectory, **settings), noise)
    )
    assert torch.equal(sample(model, noise), plain)


@pytest.mark.parametrize("features", ["cached", "same step"])
def test_two_feature_blends_hold_two_places_and_do_not_blend_each_others_source(inverted, features):
    model, trajectory, noise = inverted
    corner = torch.zeros(1, 64, 64)
    corner[:, :32, :32] = 1
    settings = {"layers": EVERYTHING, "source_features": features}
    first = blend(model, trajectory, mask=half(), **settings)
    both = sample(blend(first, trajectory, mask=corner, **settings), noise)
    assert differs(both, sample(first, noise))
    everywhere = blend(first, trajectory, alpha_inside=0.0, **settings)
    alone = blend(model, trajectory, alpha_inside=0.0, **settings)
    torch.testing.assert_close(sample(everywhere, noise), sample(alone, noise), rtol=1e-4, atol=1e-4)


def test_an_end_that_another_node_replaced_by_something_else_is_refused(inverted):
    model = inverted[0].clone()
    model.add_object_patch("diffusion_model.out", torch.nn.Identity())
    with pytest.raises(ValueError, match="leave 'out' off the layers"):
        blend(model, inverted[1], alpha_inside=0.5)
    blend(model, inverted[1], alpha_inside=0.5, layers="output", source_features="same step")


def pieces_by_route(model, trajectory, noise, monkeypatch):
    """({level: pieces} recorded, the same beside the steps, how often a feature was met in the recording)."""
    settings = {"layers": EVERYTHING, "alpha_inside": 0.5}
    met, kept, meet, pieces = [], [], Recording.meet, Recording.pieces
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "meet", lambda self, key, *rest: (met.append(key), meet(self, key, *rest))[1])
        levels = source_of(blend(model, trajectory, source_features="cached", **settings)).levels
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "pieces", lambda self: (kept.append(dict(pieces(self))), kept[-1])[1])
        sample(blend(model, trajectory, source_features="same step", **settings), noise)
    return [level.views(level.piece) for level in levels], kept, met


@pytest.mark.parametrize("pictures", [1, 2])
def test_an_apply_kv_on_the_model_stays_out_of_the_sources_passes(inverted, monkeypatch, pictures):
    model, trajectory, noise = inverted
    tuned = invert(model, tiny_models.latent(pictures, seed=4), original())[0]
    kv = harness.tune(model, tuned, original(), layers="all")[0]
    behind = harness.apply(model, kv, source_guidance=3.0, start_percent=0.0)
    noise = noise.repeat(pictures, 1, 1, 1)
    alone, _, once = pieces_by_route(model, trajectory, noise, monkeypatch)
    cached, same_step, met = pieces_by_route(behind, trajectory, noise, monkeypatch)
    assert met == once and len(met) == len(cached) * len(set(met))
    assert differs(sample(behind, noise), sample(model, noise))
    for ours, beside_steps, without in zip(cached, same_step, alone, strict=True):
        for name in without:
            assert torch.equal(ours[name], without[name])
            torch.testing.assert_close(ours[name], beside_steps[name], rtol=1e-4, atol=1e-4)
