"""Recording, inverting and tuning behind other nodes' guidance and patches: served, or refused by the node's name.

Every way out that a refusal names is taken here.
"""

import harness
import pytest
import tiny_models
import torch
from attention_fusion.fusing import CACHED, SAME_STEP, empty, encoder, fuse, inverted
from attention_fusion.fusing import sample as sample_fused
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from palimpsest.nodes.attention_map.nodes import FindWords
from palimpsest.nodes.feature_blend.nodes import FeatureBlend, TuneFeatureBlend
from palimpsest.nodes.host import others
from palimpsest.nodes.words import ChosenWords

STEPS = 4
NODES = {
    "Self-Attention Guidance": (SelfAttentionGuidance, {}),
    "PerturbedAttentionGuidance": (PerturbedAttentionGuidance, {}),
    "Normalized Attention Guidance": (NAGuidance, {}),
    "Adaptive Projected Guidance": (APG, {}),
}
by_guidance = pytest.mark.parametrize("name", NODES)
pytestmark = pytest.mark.usefixtures("inference")


def guided(model, name, **settings):
    node, usual = NODES[name]
    return tiny_models.execute(node, model=model, **usual | settings)[0]


def shrunk(model, **settings):
    """Deep Shrink, which by default here ends before the sampling does."""
    settings = {"block_number": 1, "end_percent": 0.6} | settings
    return tiny_models.execute(PatchModelAddDownscale, model=model, **settings)[0]


def tiled(model):
    return tiny_models.execute(HyperTile, model=model, tile_size=32, swap_size=2, max_depth=0)[0]


@pytest.fixture(scope="module")
def picture():
    """(model, trajectory, noise)."""
    with torch.inference_mode():
        model = tiny_models.unet()
        return model, *harness.invert(model, steps=STEPS)[:2]


def sample(model, noise):
    return harness.sample(model, noise, steps=STEPS)


def blend(model, trajectory, features, **settings):
    inputs = {"trajectory": trajectory, "positive": harness.prompts()[0], "mask": harness.half()} | settings
    return tiny_models.execute(FeatureBlend, model=model, source_features=features, **inputs)[0]


def tune_blend(model, trajectory, **settings):
    inputs = {"target_positive": harness.edits()[0], "negative": harness.edits()[1], "steps": 2} | settings
    inputs |= {"trajectory": trajectory, "positive": harness.prompts()[0]}
    return tiny_models.execute(TuneFeatureBlend, model=model, **inputs)[0]


# ---- names


@by_guidance
def test_nodes_are_named_by_what_they_put_on_a_model(name):
    model = tiny_models.unet()
    assert others.patching_nodes(model) == others.guiding_nodes(model) == ""
    assert others.patching_nodes(guided(model, name)) == name
    assert others.patching_nodes(shrunk(guided(model, name))).count(", ") == 1


def test_our_own_functions_are_not_another_nodes(picture):
    model, trajectory, _ = picture
    patched = harness.apply(model, harness.tune(model, trajectory, inner_steps=1)[0], source_guidance=3.0)
    assert others.patching_nodes(patched) == ""
    before, after = patched.model_options, others.without_guidance(patched.model_options)
    assert after["sampler_post_cfg_function"] == before["sampler_post_cfg_function"]
    both = guided(patched, "Self-Attention Guidance").model_options
    assert others.without_guidance(both)["sampler_post_cfg_function"] == before["sampler_post_cfg_function"]
    assert len(both["sampler_post_cfg_function"]) == 2
    without = others.without_guidance(guided(model, "Adaptive Projected Guidance").model_options)
    assert not set(without) & {*others.GUIDANCE, others.ALWAYS_NEGATIVE}


# ---- at guidance 1 the model is looked at as it is


@by_guidance
def test_inverting_at_guidance_1_is_the_models_own(picture, name):
    model, trajectory, _ = picture
    found, _, _, report = harness.invert(guided(model, name), steps=STEPS)
    assert torch.equal(found.latents, trajectory.latents)
    acts_by_guidance = name != "Normalized Attention Guidance"  # this one stands in the layers alone
    assert (f"at guidance 1 the guidance of other nodes was left out ({name})" in report) == acts_by_guidance
    at_3 = [harness.invert(each, guidance=3.0, steps=STEPS)[0].latents for each in (guided(model, name), model)]
    assert harness.acts(*at_3)


@by_guidance
def test_what_is_recorded_of_the_source_is_without_it(picture, name):
    model, trajectory, noise = picture
    found = [sample(blend(guided(model, name), trajectory, each), noise) for each in (CACHED, SAME_STEP)]
    harness.assert_close(*found)
    harness.assert_acts(found[0], sample(blend(model, trajectory, CACHED), noise))
    first = sample(guided(blend(model, trajectory, CACHED), name), noise)
    harness.assert_close(first, found[0])


@by_guidance
def test_attention_is_recorded_without_it(name):
    text = encoder("sd15")
    model, _, _, trajectory, noise = inverted(text, "sd15", 2)
    found = []
    for features in (CACHED, SAME_STEP):
        patched, positive, _ = fuse(
            guided(model, name), text, trajectory, source_features=features, layers="all but the finest"
        )
        found.append(sample_fused(patched, noise, positive, empty(text)))
    harness.assert_close(*found)


@by_guidance
def test_words_are_found_without_it(picture, name):
    model, trajectory, _ = picture
    positive = harness.prompts()[0]
    inputs = {"trajectory": trajectory, "positive": positive, "tokens": ChosenWords(("a",), ((2,),), positive[0][0])}
    found = [
        tiny_models.execute(FindWords, model=each, **inputs)[0].of(None).levels for each in (guided(model, name), model)
    ]
    for grid in found[1]:
        assert torch.equal(found[0][grid], found[1][grid])


# ---- tuning


@by_guidance
@pytest.mark.parametrize("tune", ["kv", "blend"])
def test_a_tuning_runs_through_it_or_names_it_and_the_way_out_works(picture, name, tune):
    model, trajectory, noise = picture

    def run(model):
        return harness.tune(model, trajectory, inner_steps=2)[0] if tune == "kv" else tune_blend(model, trajectory)

    try:
        run(guided(model, name))
    except ValueError as refusal:
        assert "another node" in str(refusal) and name in str(refusal)
        assert "Connect the model from before that node; it may act while the edit is sampled" in str(refusal)
        assert name in ("Self-Attention Guidance", "Normalized Attention Guidance")
    found = run(model)
    if tune == "kv":
        edited = guided(harness.apply(model, found), name)
    else:
        edited = guided(blend(model, trajectory, CACHED, blend_weights=found), name)
    harness.assert_acts(sample(edited, noise), sample(guided(model, name), noise))


def test_an_average_over_steps_that_no_gradient_goes_through_is_named(picture):
    model, trajectory, _ = picture
    with pytest.raises(ValueError, match=r"Tune KV needs a gradient.* Adaptive Projected Guidance"):
        harness.tune(guided(model, "Adaptive Projected Guidance", momentum=0.5), trajectory)


@by_guidance
def test_by_the_prompt_alone_a_tuning_leaves_guidance_out(picture, name):
    model, trajectory, _ = picture
    settings = {"tune_with": "prompt only", "inner_steps": 2}
    found = [harness.tune(each, trajectory, **settings)[1] for each in (guided(model, name), model)]
    harness.assert_close(
        *found, tolerance=1e-2
    )  # Self-Attention Guidance computes the attention of a block its own way


def test_passes_that_guidance_adds_are_not_taken_for_the_source(picture):
    model, trajectory, _ = picture
    settings = {"layers": "all", "inner_steps": 0}
    found = [
        harness.tune(each, trajectory, **settings)[0] for each in (guided(model, "PerturbedAttentionGuidance"), model)
    ]
    assert torch.equal(found[0].source[0], found[1].source[0])  # the first step stands on the same latent


def test_a_node_that_wants_as_many_keys_as_queries_goes_behind_ours(picture):
    model, trajectory, noise = picture
    kv, name = harness.tune(model, trajectory, inner_steps=1)[0], "Self-Attention Guidance"
    with pytest.raises(ValueError, match=r"Self-Attention Guidance\): put that node after this one"):
        harness.apply(guided(model, name), harness.tune(model, trajectory, layers="all", inner_steps=1)[0])
    harness.assert_acts(sample(guided(harness.apply(model, kv), name), noise), sample(guided(model, name), noise))


# ---- sizes that change over the steps


def test_features_are_blended_where_their_size_changes(picture):
    model, trajectory, noise = picture
    small = shrunk(model)
    found = [sample(blend(small, trajectory, each), noise) for each in (CACHED, SAME_STEP)]
    harness.assert_close(*found)
    weights = tune_blend(small, trajectory)
    harness.assert_acts(sample(blend(small, trajectory, CACHED, blend_weights=weights), noise), found[0])


def test_the_ways_out_of_features_of_another_size(picture):
    model, trajectory, noise = picture
    with pytest.raises(ValueError, match="put it before this node, or set source_features to 'same step'"):
        sample(shrunk(blend(model, trajectory, CACHED)), noise)
    ways = (
        sample(shrunk(blend(model, trajectory, SAME_STEP)), noise),
        sample(blend(shrunk(model), trajectory, CACHED), noise),
    )
    assert torch.isfinite(torch.stack(ways)).all()


def test_a_tuning_over_sizes_that_change_names_the_node_and_the_ways_out_work(picture):
    model, trajectory, noise = picture
    with pytest.raises(ValueError, match=r"another node resizes it while sampling \(PatchModelAddDownscale") as refusal:
        harness.tune(shrunk(model), trajectory, inner_steps=1)
    assert "from before that node, or let it act in all steps (end_percent 1)" in str(refusal.value)
    always = shrunk(model, end_percent=1.0)
    kv = harness.tune(always, trajectory, inner_steps=1)[0]
    harness.assert_acts(sample(harness.apply(always, kv, "recompute"), noise), sample(always, noise))
    kv = harness.tune(model, trajectory, inner_steps=1)[0]
    small = shrunk(model)
    harness.assert_acts(sample(harness.apply(small, kv), noise), sample(small, noise))
    with pytest.raises(ValueError, match="take it out, or choose mode extend"):
        sample(harness.apply(small, kv, "recompute"), noise)


# ---- tiles


def test_tiles_are_recorded_and_tuned_through_or_refused(picture):
    model, trajectory, noise = picture
    torch.manual_seed(0)
    kv, rebuilt, _ = harness.tune(tiled(model), trajectory, inner_steps=3)
    assert torch.isfinite(rebuilt).all()
    harness.assert_acts(sample(harness.apply(tiled(model), kv), noise), sample(tiled(model), noise))
    assert torch.isfinite(sample(blend(tiled(model), trajectory, CACHED), noise)).all()
    tune_blend(tiled(model), trajectory)
    text = encoder("sd15")
    model, _, _, trajectory, noise = inverted(text, "sd15")
    with pytest.raises(ValueError, match=r"because another node merges or tiles them .* take it out"):
        fuse(tiled(model), text, trajectory, source_features=CACHED)
    patched, positive, _ = fuse(model, text, trajectory, source_features=CACHED)
    assert torch.isfinite(sample_fused(patched, noise, positive, empty(text))).all()
