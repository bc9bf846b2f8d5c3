"""Attention Fusion in the host: the maps against those written down, identity, memory, refusals."""

import math
from dataclasses import replace

import pytest
import tiny_models
import torch
from attention_fusion.fusing import (
    CACHED,
    EDIT,
    SAME_STEP,
    SOURCE,
    STEPS,
    acting,
    acts,
    empty,
    families,
    fuse,
    sample,
    source_of,
    sources,
    spied,
    video,
)
from comfy_extras.nodes_hypertile import HyperTile
from palimpsest.kernels import attention_fusion as maths
from palimpsest.nodes import host
from palimpsest.nodes.attention_fusion import apply as fusion_apply
from palimpsest.nodes.attention_fusion.nodes import AttentionFusion
from palimpsest.nodes.attention_fusion.prompts import read_prompts
from palimpsest.nodes.host import reference

# ---- identity


@families
@sources
def test_with_both_fractions_0_it_is_the_plain_model_bit_for_bit(setup, family, source_features):
    model, clip, _, trajectory, noise = setup(family)
    patched, positive, report = fuse(
        model, clip, trajectory, self_attention_until=0.0, cross_attention_until=0.0, source_features=source_features
    )
    assert "nothing is fused" in report
    assert torch.equal(sample(patched, noise, positive, empty(clip)), sample(model, noise, positive, empty(clip)))


@families
def test_recorded_and_beside_each_step_are_the_same_and_the_model_stays_itself(setup, family):
    model, clip, _, trajectory, noise = setup(family, 2)
    results = []
    for source_features in (CACHED, SAME_STEP):
        patched, positive, _ = fuse(
            model, clip, trajectory, source_features=source_features, blend_words="dog", self_attention_until=1.0
        )
        plain = sample(model, noise, positive, empty(clip))
        results.append(sample(patched, noise, positive, empty(clip)))
        assert torch.equal(sample(model, noise, positive, empty(clip)), plain)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert acts(results[0], plain)


@pytest.mark.parametrize("layers", ["all", "decoder"])
def test_the_memory_that_is_stated_is_what_it_takes(setup, layers):
    """Also behind Video Attention, which gathers the frames' keys afterwards."""
    model, clip, _, trajectory, _ = setup("sdxl", 2, 11, 9)
    patched, _, report = fuse(
        video(model), clip, trajectory, layers=layers, cross_attention_until=1.0, source_features=CACHED
    )
    taken = source_of(patched).bytes
    assert taken == reference.expected_bytes(model, acting(patched).wanted)
    assert f"{taken / 1e6:.1f} MB" in report


def test_what_does_not_fit_is_refused_or_runs_beside_each_step(setup, monkeypatch):
    model, clip, _, trajectory, _ = setup("sd15", 3)
    needed = source_of(fuse(model, clip, trajectory, source_features=CACHED)[0]).bytes
    monkeypatch.setattr(reference, "free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match="set source_features to 'same step'"):
        fuse(model, clip, trajectory, source_features=CACHED)
    patched, _, report = fuse(model, clip, trajectory)
    assert isinstance(source_of(patched), reference.SameStep)
    assert "one more row" in report
    monkeypatch.setattr(reference, "free_memory", lambda: 4 * needed)
    assert isinstance(source_of(fuse(model, clip, trajectory)[0]), reference.Cached)


@families
def test_on_the_trajectory_with_the_sources_prompt_every_layer_gives_what_it_gave(setup, family):
    """The first step stands on the recorded latent: fused and plain attention are the same there, up to rounding."""
    model, clip, _, trajectory, noise = setup(family)
    patched, positive, _ = fuse(
        model, clip, trajectory, edit_text=SOURCE, self_attention_until=1.0, cross_attention_until=1.0
    )
    found = []
    for each in (patched, model):
        each = each.clone()
        each.set_model_sampler_post_cfg_function(lambda args: found.append(args["denoised"]) or args["denoised"])
        sample(each, noise, positive, empty(clip))
    torch.testing.assert_close(found[0], found[STEPS], rtol=1e-4, atol=1e-4)
    assert acts(found[1], found[STEPS + 1])


# ---- the maps


def shares(query, key, heads):
    q, k = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)


def outcome(weights, value, heads):
    v = value.double().unflatten(-1, (heads, -1)).transpose(1, 2)
    return (weights @ v).transpose(1, 2).flatten(2)


def assert_close(a, b):
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


@families
@pytest.mark.parametrize("blend_words", ["", "dog"])
def test_layers_do_what_the_written_down_maps_do(setup, monkeypatch, family, blend_words):
    model, clip, _, trajectory, noise = setup(family, 2)
    settings = {"blend_words": blend_words, "self_attention_until": 1.0, "source_features": SAME_STEP}
    patched, positive, _ = fuse(model, clip, trajectory, emphasis=2.0, **settings)
    prompts = read_prompts(clip, SOURCE, EDIT, blend_words=blend_words, emphasis=2.0)
    layers = host.self_attention_layers(model)
    own, crosses = spied(patched, "attn1", layers[-1]), [spied(patched, "attn2", layer) for layer in layers]
    masses = []

    def every_other(mass, threshold):
        masses.append(mass)
        return (torch.arange(mass.numel()) % 2).reshape(mass.shape).to(mass)

    monkeypatch.setattr(maths, "blend_mask", every_other)
    sample(patched, noise, positive, empty(clip))
    (q_s, k_s, *_), (q, k, v, out, heads) = own[:2]  # the source's pass, then the edit's: negative rows first
    assert (len(q_s), len(q)) == (2, 4)
    assert_close(out[:2], outcome(shares(q[:2], k[:2], heads), v[:2], heads))
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if blend_words:
        places = q.shape[1]
        assert masses[0].flatten(1).shape == (2, places)  # the grid nearest to 16 x 16 is the finest
        mask = (torch.arange(2 * places) % 2).reshape(2, 1, places, 1).double()
        recorded = [
            shares(*seen[0][:2], seen[0][4])[..., 3].mean(1) for seen in crosses if seen[0][0].shape[1] == places
        ]
        assert_close(masses[0].flatten(1), torch.stack(recorded).mean(0))
    fused = maths.fused_self_map(shares(q_s, k_s, heads), shares(q[2:], k[2:], heads), mask)
    assert_close(out[2:], outcome(fused, v[2:], heads))

    (q_s, k_s, *_), (q, k, v, out, heads) = crosses[-1][:2]
    assert_close(out[:2], outcome(shares(q[:2], k[:2], heads), v[:2], heads))
    both = shares(q_s, k_s, heads), shares(q[2:], k[2:], heads)
    fused = maths.fused_cross_map(*both, prompts.link.double(), prompts.own.double())
    assert_close(out[2:], outcome(fused, v[2:], heads))


# ---- settings

DIFFERENT = {
    "source_text": "a cat", "edit_text": "a dog", "self_attention_until": 0.2, "cross_attention_until": 0.7,
    "blend_words": "cat", "blend_threshold": 0.4, "new_words": "attention of the words they replace", "emphasis": 2.5,
    "layers": "decoder", "fuse_negative": True, "source_features": SAME_STEP,
}  # fmt: skip


def test_every_value_arrives_under_its_own_name(setup, monkeypatch):
    model, clip, _, trajectory, _ = setup()
    fusion = acting(fuse(model, clip, trajectory, **DIFFERENT)[0]).wanted
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    assert fusion.above == {"self": to_sigma(0.2), "cross": to_sigma(0.7)}
    assert (fusion.threshold, fusion.negative) == (0.4, True)
    assert {block for layers in fusion.layers.values() for block, *_ in layers} == {"output"}
    assert fusion.prompts.words.words == ("cat",)
    assert fusion.prompts.link[2, 2] == 2.5  # the dog where the cat was
    found = []
    monkeypatch.setattr(fusion_apply, "apply", lambda *args, **_: found.append(args[3].named()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuse(model, clip, trajectory, **DIFFERENT)
    assert found == [DIFFERENT]


def test_defaults_of_the_settings_are_those_of_the_node():
    entries = {entry.id: entry for entry in AttentionFusion.define_schema().inputs}
    for name, default in fusion_apply.FusionSettings("", "").named().items():
        entry = entries[name]
        given = entry.default if entry.default is not None else entry.options[0]
        assert name.endswith("_text") or given == default, name


# ---- refusals


def test_what_cannot_be_fused_is_refused_in_a_sentence(setup):
    model, clip, _, trajectory, noise = setup("sd15", 2)
    patched, positive, _ = fuse(model, clip, trajectory)
    with pytest.raises(ValueError, match="the trajectory holds 2 pictures, the sampled batch has 3"):
        sample(patched, noise[:1].expand(3, -1, -1, -1).contiguous(), positive, empty(clip))
    with pytest.raises(ValueError, match="recorded for a latent of 8 x 8, sampling runs at 12 x 8"):
        sample(patched, torch.randn(2, 4, 8, 12), positive, empty(clip))
    with pytest.raises(ValueError, match="no sampled prompt is the edit's of Attention Fusion"):
        sample(patched, noise, tiny_models.prompt(5), empty(clip))
    with pytest.raises(ValueError, match="recorded with another model architecture"):
        fuse(tiny_models.unet("sdxl"), clip, trajectory)
    with pytest.raises(ValueError, match="mask holds NaN or infinite values"):
        fuse(model, clip, trajectory, mask=torch.full((1, 8, 8), torch.nan))
    tiled = tiny_models.execute(HyperTile, model=patched, tile_size=32, swap_size=2, max_depth=0)[0]
    with pytest.raises(ValueError, match="another node merges or tiles them"):
        sample(tiled, noise, positive, empty(clip))
    late = replace(trajectory, sigmas=tuple(sigma / 100 for sigma in trajectory.sigmas))
    with pytest.raises(ValueError, match="lies within self_attention_until and cross_attention_until: raise"):
        fuse(model, clip, late)
    with pytest.raises(ValueError, match="no level of the trajectory lies within cross_attention_until: raise"):
        fuse(model, clip, late, self_attention_until=1.0)


def test_cached_maps_of_an_inpaint_model_are_refused_and_beside_each_step_they_work(clips, setup):
    model = tiny_models.unet("sd15-inpaint")
    trajectory = setup()[3]
    trajectory = replace(trajectory, layout=host.layout_fingerprint(model))
    with pytest.raises(ValueError, match="set source_features to 'same step'"):
        fuse(model, clips["sd15"], trajectory, source_features=CACHED)
    patched, positive, _ = fuse(model, clips["sd15"], trajectory)
    noise = setup()[4]
    assert torch.isfinite(sample(patched, noise, positive, empty(clips["sd15"]))).all()
