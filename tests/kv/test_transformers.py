"""Recorded keys and values on transformers: same run bit-equal, what acts where, what stays, and what is refused."""

import comfy.samplers
import pytest
import tiny_models
import torch
from comfy_extras import nodes_custom_sampler
from harness import assert_acts, assert_close
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.host import reference
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from palimpsest.nodes.words import ChosenWords
from tiny_transformers import APART, EVERY, FAMILIES, latent, own_run, prompt, sample

STEPS = 3
EVERYWHERE = {"start_percent": 0.0, "source_guidance": 1.0, "layers": "all"}

pytestmark = pytest.mark.usefixtures("inference")


def tune(model, trajectory, family, tokens=9, **settings):
    given = {"positive": prompt(family, 1, tokens), "inner_steps": 0, "layers": "all"} | settings
    return tiny_models.execute(TuneKV, model=model, trajectory=trajectory, **given)


def apply(model, kv, **settings):
    return tiny_models.execute(ApplyKV, model=model, kv=kv, **EVERYWHERE | settings)[0]


def drawn(model, family, seed=1, pictures=1, text=1, tokens=9, **settings):
    given = {"steps": STEPS, "cfg": 1.0, "seed": seed} | settings
    return sample(model, prompt(family, text, tokens), prompt(family, 2), latent(family, pictures), **given)


def left(model, family):
    """A MASK in pixels, white on the left half."""
    height, width = (side * 8 for side in EVERY[family].side)
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


@pytest.mark.parametrize("family", [*FAMILIES, *APART])
def test_the_same_run_is_bit_equal_and_another_prompt_is_changed(models, family):
    model = models(family)
    trajectory, plain = own_run(model, family)
    kv, clean, report = tune(model, trajectory, family)
    assert clean["samples"].shape == plain.shape
    assert_close(clean["samples"], plain)
    assert "levels" in report
    assert kv.family in report
    assert torch.equal(drawn(apply(model, kv, mode="frozen"), family), plain)
    edit = drawn(model, family, text=3)
    for mode in ("extend", "frozen"):
        assert_acts(drawn(apply(model, kv, mode=mode), family, text=3), edit)
    assert torch.equal(drawn(model, family), plain)


@pytest.mark.parametrize("family", [*FAMILIES, *APART])
def test_what_does_nothing_is_bit_equal(models, family):
    """Strength 0 and a mask that is black, guided, with prompts of two lengths."""
    model = models(family)
    kv = tune(model, own_run(model, family)[0], family)[0]
    black = torch.zeros(1, 32, 32)
    plain = drawn(model, family, text=3, cfg=3.0, tokens=12)
    for settings in ({"strength": 0.0}, {"mask": black}, {"mask": black, "mode": "frozen"}):
        assert torch.equal(drawn(apply(model, kv, **settings), family, text=3, cfg=3.0, tokens=12), plain), settings
    assert_acts(drawn(apply(model, kv), family, text=3, cfg=3.0, tokens=12), plain)


@pytest.mark.parametrize("family", ["flux", "qwen", "zimage", "sd3", "wan"])
def test_beside_every_step_is_as_recorded(models, family, monkeypatch):
    """Where memory is too small the source has a pass of its own at each step, on the same latents."""
    model = models(family)
    trajectory, plain = own_run(model, family)
    recorded = tune(model, trajectory, family)[0]
    monkeypatch.setattr(reference, "free_memory", lambda: 0)
    beside, _, report = tune(model, trajectory, family)
    assert "one more row" in report
    assert torch.equal(drawn(apply(model, beside, mode="frozen"), family), plain)
    found = (drawn(apply(model, kv), family, text=3, cfg=3.0) for kv in (recorded, beside))
    assert_close(*found)


def joint(queries, keys, values, weights):
    """softmax(q k / sqrt(d) + log w) v, written out; weights (N, M)."""
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5 + weights.log()
    return scores.softmax(-1) @ values


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen", "wan", "anima"])
def test_extend_is_attention_to_both_pictures_written_out(models, family):
    """The last layer's attention, of its own q, k, v and of those of the source's run; both masks and strength."""
    model = models(family)
    trajectory, _ = own_run(model, family)
    white = left(model, family)
    kv = tune(model, trajectory, family)[0]
    side = [-(-cells // (1 if family == "flux2" else 2)) for cells in EVERY[family].side]
    half = (torch.arange(side[1]) < side[1] // 2).float().repeat(side[0])
    seen = []

    def last(function, q, k, v, heads, mask=None, skip_reshape=False, **named):
        out = function(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **named)
        if named["transformer_options"].get("palimpsest_test"):
            seen.append((q, k, v, mask, out))
        return out

    watched = model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = last
    watched.model_options["transformer_options"]["palimpsest_test"] = True
    patched = apply(watched, kv, strength=0.5, mask=white, source_mask=white)
    drawn(patched, family, text=3, steps=STEPS)
    assert seen, "the override of another node is still asked"
    q, k, v, _, out = next(each for each in seen if each[1].shape[-2] > each[0].shape[-2])
    tokens, image = q.shape[-2], len(half)
    added = k.shape[-2] - tokens
    assert added == int(half.sum())
    weights = torch.ones(tokens, tokens + added)
    weights[:, tokens:] = 0.5
    wanted = joint(q, k, v, weights).transpose(1, 2).flatten(2)
    assert_close(out, wanted, 1e-5)
    assert tokens == image if family in APART else image + 9 <= tokens


def test_a_mask_keeps_the_source_inside(models):
    """What is outside changes less: it looks at what is inside, never at the source."""
    model, family = models("flux"), "flux"
    kv = tune(model, own_run(model, family)[0], family)[0]
    mask = left(model, family)
    plain = drawn(model, family, text=3, steps=1)
    found = drawn(apply(model, kv, mask=mask), family, text=3, steps=1)
    inside = (found - plain)[..., : mask.shape[-1] // 16].norm()
    outside = (found - plain)[..., mask.shape[-1] // 16 :].norm()
    assert inside > 2 * outside


@pytest.mark.parametrize("family", ["flux", "zimage", "wan"])
def test_words_and_another_nodes_override_act_beside_it(models, family):
    model = models(family)
    kv = tune(model, own_run(model, family)[0], family)[0]
    positive, calls = prompt(family, 3, 9), []

    def theirs(function, *args, **named):
        calls.append(1)
        return function(*args, **named)

    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = theirs
    words = ChosenWords(("word",), ((3, 4),), positive[0][0])
    given = {"mask": left(model, family), "tokens": words, "mask_negative": False}
    both = {}
    for order in ("words first", "source first"):
        patched = apply(other, kv) if order == "source first" else other
        patched = tiny_models.execute(CrossAttentionMask, model=patched, **given)[0]
        patched = apply(patched, kv) if order == "words first" else patched
        both[order] = sample(patched, positive, prompt(family, 2), latent(family), steps=STEPS, cfg=3.0, seed=1)
    assert calls
    assert torch.equal(*both.values())
    alone = sample(apply(model, kv), positive, prompt(family, 2), latent(family), steps=STEPS, cfg=3.0, seed=1)
    assert_acts(both["source first"], alone)


def test_two_sources_and_guidance_by_one(models):
    model, family = models("zimage"), "zimage"
    one = tune(model, own_run(model, family)[0], family)[0]
    two = tune(model, own_run(model, family, seed=7)[0], family)[0]
    mask = left(model, family)
    alone = drawn(apply(model, one, mask=mask), family, text=3)
    both = drawn(apply(apply(model, one, mask=mask), two, mask=1 - mask), family, text=3)
    assert_acts(both, alone)
    guided = drawn(apply(model, one, source_guidance=3.0), family, text=3, cfg=3.0)
    assert_acts(guided, drawn(apply(model, one), family, text=3, cfg=3.0))
    assert torch.isfinite(guided).all()


@pytest.mark.parametrize("family", ["zimage", "wan", "anima"])
def test_a_picture_inverted_by_uni_inv_lends_its_keys_and_values(models, family):
    """Through Invert Picture and SamplerCustomAdvanced, as the nodes are wired."""
    model = models(family)
    picture = torch.randn(latent(family).shape, generator=torch.Generator().manual_seed(3))
    given = {"positive": prompt(family, 1), "steps": 4, "scheduler": "simple"}
    trajectory, noise, rebuilt, _, found = tiny_models.execute(
        Invert, model=model, latent={"samples": picture}, **given
    )
    kv, clean, report = tune(model, trajectory, family)
    assert_close(clean["samples"], picture)
    assert "the prompt differs" not in report
    assert "levels" in report

    def edited(patched, text):
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(prompt(family, text), prompt(family, 2))
        guider.set_cfg(1.0)
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor(trajectory.sigmas)
        run = nodes_custom_sampler.SamplerCustomAdvanced.execute(found, guider, sampler, sigmas, noise)
        return run.args[0]["samples"]

    assert_close(edited(model, 1), rebuilt["samples"])
    plain = edited(model, 3)
    for mode in ("extend", "frozen"):
        assert_acts(edited(apply(model, kv, mode=mode), 3), plain)
    # at the settings that the nodes have by themselves
    default = tiny_models.execute(ApplyKV, model=model, kv=kv)[0]
    assert_acts(edited(default, 3), plain)


def test_layers_spans_and_batches(models):
    model, family = models("flux"), "flux"
    trajectory, _ = own_run(model, family)
    everything = tune(model, trajectory, family)[0]
    decoder = tune(model, trajectory, family, layers="decoder", keyframes=2, start_percent=0.3)[0]
    assert decoder.layers == (("single", 1, 0),)
    assert len(decoder.levels) < len(everything.levels) == STEPS
    assert torch.equal(
        drawn(apply(model, everything, layers="decoder"), family, text=3),
        drawn(apply(model, tune(model, trajectory, family, layers="decoder")[0]), family, text=3),
    )
    assert_acts(drawn(apply(model, decoder), family, text=3), drawn(model, family, text=3))
    two = drawn(apply(model, everything), family, text=3, pictures=2)
    assert two.shape[0] == 2
    masks = torch.cat([left(model, family), 1 - left(model, family)])
    batch = tune(model, own_run(model, family, pictures=2)[0], family)[0]
    assert torch.isfinite(drawn(apply(model, batch, source_mask=masks), family, text=3, pictures=2)).all()


def test_what_is_refused(models):
    model, family = models("flux"), "flux"
    trajectory, _ = own_run(model, family)
    kv = tune(model, trajectory, family)[0]
    with pytest.raises(ValueError, match=r"inner_steps is 10: keys and values of FLUX\.1 are recorded, not learned"):
        tune(model, trajectory, family, inner_steps=10, negative=prompt(family, 2))
    with pytest.raises(ValueError, match="auto_layers is for tunings of U-Nets"):
        tune(model, trajectory, family, auto_layers=True)
    with pytest.raises(ValueError, match=r"load the FLUX\.1 model that was inverted"):
        apply(models("zimage"), kv)
    with pytest.raises(ValueError, match="invert the picture with this model"):
        tune(models("zimage"), trajectory, "zimage")
    with pytest.raises(ValueError, match="take mode extend or frozen"):
        apply(model, kv, mode="recompute")
    with pytest.raises(ValueError, match=r"look_ahead is 0\.2"):
        apply(model, kv, look_ahead=0.2)
    larger = latent(family, side=(16, 8))
    with pytest.raises(ValueError, match="the trajectory was recorded for a latent of 8 x 12"):
        sample(apply(model, kv), prompt(family, 3), prompt(family, 2), larger, steps=1)


def test_a_video_looks_at_a_recorded_picture_beside_its_own_frames_and_takes_it_for_none_of_them(models):
    model, family = models("wan"), "wan"
    kv = tune(model, own_run(model, family)[0], family)[0]

    def video(patched):
        return sample(patched, prompt(family, 3), prompt(family, 2), latent(family, frames=2), steps=1)

    assert_acts(video(apply(model, kv, mode="extend")), video(model))
    with pytest.raises(ValueError, match="puts 24 recorded tokens in the place of 48"):
        video(apply(model, kv, mode="frozen"))
