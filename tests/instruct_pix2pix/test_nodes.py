"""Feature Blend, Cross-Attention Mask, attention maps and KV on models that are given the picture they change."""

import comfy.sample
import pytest
import tiny_models
import torch
from attention_fusion.fusing import encoder, fuse
from cross_attention.masked import AFTER, by_matrix, weigh_words
from harness import assert_acts, assert_close, half, invert, sample, tune
from instruct_pix2pix.editing import MIDDLE, MODELS, NEGATIVE, POSITIVE, WORDS, Editing, seen_by
from palimpsest.nodes import host
from palimpsest.nodes.attention_map.nodes import AttentionMap, FindWords, ReadAttentionMap
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.feature_blend.nodes import FeatureBlend, TuneFeatureBlend
from palimpsest.nodes.keep_outside.nodes import KeepOutside
from palimpsest.nodes.kv.nodes import ApplyKV

pytestmark = pytest.mark.usefixtures("inference")
EVERYTHING = "input, middle, output, out"


@pytest.fixture(scope="module", params=MODELS, ids=["sd15", "sdxl", "cosxl"])
def editing(request):
    with torch.inference_mode():
        return Editing(*request.param)


@pytest.fixture(scope="module")
def plain(editing):
    with torch.inference_mode():
        return editing.sample()


def blend(editing, model=None, **settings):
    inputs = {"trajectory": editing.trajectory, "positive": editing.picture, "blend_latents_until": 0.0} | settings
    return tiny_models.execute(FeatureBlend, model=model or editing.model, **inputs)[0]


def mask_words(editing, model=None, **settings):
    inputs = {"mask": half(), "tokens": editing.words, "mode": AFTER} | settings
    return tiny_models.execute(CrossAttentionMask, model=model or editing.model, **inputs)[0]


# ---- what the network is given


def test_three_rows_of_which_two_show_the_picture_in_the_hosts_unit(editing, plain):
    drawn, calls = seen_by(editing.model, editing.sample)
    assert torch.equal(drawn, plain)
    shown = editing.model.model.process_ip2p_image_in(editing.latent["samples"])
    for groups, _, pictures in calls:
        assert sorted(groups) == [NEGATIVE, MIDDLE, POSITIVE]
        rows = dict(zip(groups, pictures, strict=True))
        assert not rows[NEGATIVE].any()
        assert_close(rows[MIDDLE], shown, 1e-6)
        assert_close(rows[POSITIVE], shown, 1e-6)


@pytest.mark.parametrize("features", ["cached", "same step"])
def test_the_source_is_looked_at_with_the_edits_picture(editing, features):
    shown = editing.model.model.process_ip2p_image_in(editing.latent["samples"])
    settings = {"source_features": features, "layers": EVERYTHING, "mask": half()}
    if features == "cached":
        _, calls = seen_by(editing.model, lambda model: blend(editing, model, **settings))
    else:
        _, calls = seen_by(blend(editing, **settings), editing.sample)
    alone = [(x, pictures) for groups, (x, *_), pictures in calls if len(groups) == 1]
    assert len(alone) == editing.trajectory.steps
    for (x, (picture,)), latent in zip(alone, editing.trajectory.latents[:-1], strict=True):
        assert_close(x, latent, 1e-6)
        assert_close(picture, shown, 1e-6)


# ---- what they do


def test_the_sources_features_in_all_three_rows_give_the_source(editing, plain):
    """At alpha 0 everywhere all rows draw what the source's own row drew, so that there is nothing to guide."""
    rebuilt = [
        editing.sample(blend(editing, layers=EVERYTHING, alpha_inside=0.0, source_features=features))
        for features in ("cached", "same step")
    ]
    assert_close(*rebuilt, 1e-3)
    patched = blend(editing, layers=EVERYTHING, alpha_inside=0.0)
    assert_close(rebuilt[0], sample(patched, editing.noise, editing.nothing, editing.nothing, cfg=1.0, steps=3), 1e-3)
    assert_acts(rebuilt[0], plain)


def test_the_latent_is_the_sources_outside_of_the_mask(editing, plain):
    settings = {"layers": EVERYTHING, "mask": half(), "blend_latents_until": 1.0}
    for added in (None, torch.randn(editing.noise.shape, generator=torch.Generator().manual_seed(3))):
        edited = editing.sample(blend(editing, **settings), added=added)
        assert_close(edited[..., 4:], editing.latent["samples"][..., 4:], 1e-3)
        assert_acts(edited[..., :4], editing.latent["samples"][..., :4])
    kept = tiny_models.execute(
        KeepOutside, source=editing.pixels, edited=1 - editing.pixels, mask=half(), grow=0, feather=0
    )[0]
    assert torch.equal(kept[..., 32:, :], editing.pixels[..., 32:, :])


@pytest.mark.parametrize("mask_negative", [False, True])
def test_words_are_masked_in_the_row_that_has_them(editing, mask_negative):
    """And where that is asked for at the same positions of both others, so that no guidance sees a difference."""
    rows = (NEGATIVE, MIDDLE, POSITIVE) if mask_negative else (POSITIVE,)
    found = editing.sample(mask_words(editing, mask_negative=mask_negative))
    by_hand = editing.sample(by_matrix(editing.model, weigh_words(half(), AFTER, WORDS, which=rows)))
    assert_close(found, by_hand, 1e-3)


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_settings_that_do_nothing_leave_the_picture_bit_for_bit(editing, style):
    without = editing.sample(style=style)
    idle = mask_words(editing, blend(editing, alpha_outside=1.0, mask=half()), strength=0.0)
    both = mask_words(editing, blend(editing, mask=half()))
    assert_acts(editing.sample(both, style), without)
    assert torch.equal(editing.sample(idle, style), without)
    assert torch.equal(editing.sample(style=style), without)


def test_maps_are_of_the_row_with_the_words_and_change_nothing(editing, plain):
    watched, record = tiny_models.execute(AttentionMap, model=editing.model, tokens=editing.words)
    drawn = editing.sample(watched)
    assert torch.equal(drawn, plain)
    read = tiny_models.execute(ReadAttentionMap, record=record, samples={"samples": drawn})
    assert torch.isfinite(read[2]).all()
    inputs = {"trajectory": editing.trajectory, "tokens": editing.words, "positive": editing.both, "looks": 2}
    found, calls = seen_by(editing.model, lambda model: tiny_models.execute(FindWords, model=model, **inputs)[0])
    assert len(calls) == 2 and all(pictures[0].any() for _, _, pictures in calls)
    mask = tiny_models.execute(ReadAttentionMap, record=found)[1]
    assert_acts(editing.sample(mask_words(editing, mask=mask)), plain)


@pytest.mark.parametrize("mode", ["extend", "recompute", "frozen"])
def test_kv_that_was_tuned_with_the_picture_acts_under_both_guidances(editing, plain, mode):
    kv = tune(editing.model, editing.trajectory, editing.picture, editing.nothing, inner_steps=1, guidance=1.5)[0]
    settings = {"model": editing.model, "kv": kv, "mode": mode}
    assert_acts(editing.sample(tiny_models.execute(ApplyKV, source_guidance=1.0, **settings)[0]), plain)
    assert torch.equal(editing.sample(tiny_models.execute(ApplyKV, strength=0.0, **settings)[0]), plain)


def test_alphas_are_tuned_with_the_picture_in_every_row(editing):
    inputs = {"trajectory": editing.trajectory, "positive": editing.picture, "target_positive": editing.both}
    weights = tiny_models.execute(TuneFeatureBlend, model=editing.model, negative=editing.picture, steps=2, **inputs)[0]
    assert all(0 < alpha < 1 and alpha != 0.5 for alpha in weights.alphas.values())


def test_a_fused_edit_is_shown_the_picture_in_the_sources_rows_too():
    """Its source prompt has no picture of its own: beside each step it is shown the edit's."""
    editing, clip = Editing(), encoder("sd15")
    patched, fused, report = fuse(editing.model, clip, editing.trajectory)
    assert "same step" in report
    shown = editing.latent["samples"]
    editing.both = [[text, extra | {"concat_latent_image": shown}] for text, extra in fused]
    plain = editing.sample()
    drawn, calls = seen_by(patched, editing.sample)
    assert_acts(drawn, plain)
    assert all(torch.equal(pictures[0], shown) for groups, _, pictures in calls if len(groups) == 1)


# ---- batches, and what is said


def test_every_picture_of_a_batch_is_shown_its_own():
    editing = Editing(pictures=2)
    settings = {"layers": EVERYTHING, "mask": half(), "source_features": "same step"}
    together = editing.sample(mask_words(editing, blend(editing, **settings)))
    alone = Editing()
    assert_close(together[:1], alone.sample(mask_words(alone, blend(alone, **settings))), 1e-3)


def test_a_prompt_without_the_picture_is_named(editing):
    report = invert(editing.model, editing.latent, editing.nothing, editing.nothing)[3]
    name = type(editing.model.model).__name__
    assert f"the prompt shows {name} no picture to change" in report
    assert "no picture" not in invert(editing.model, editing.latent, editing.picture, editing.picture)[3]
    with pytest.raises(ValueError, match=f"'cached' of {name} need its pictures"):
        blend(editing, positive=editing.nothing, source_features="cached", alpha_inside=0.5)


def test_fresh_noise_is_that_of_the_re_noised_source_of_the_same_seed(editing):
    fresh = comfy.sample.prepare_noise(editing.latent["samples"], 5)
    noised = host.renoised(editing.trajectory, 5)
    assert_close((noised.latents[0] - noised.latents[-1]) / noised.sigmas[0], fresh, 1e-3)
    settings = {"preset": "paper", "seed": 5, "source_latents": "re-noised source"}
    assert_acts(editing.sample(blend(editing, **settings), added=fresh), editing.sample(added=fresh))
