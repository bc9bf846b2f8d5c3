"""Apply KV and Prompt Lines in the host: settings, identity, composition, refusals."""

from dataclasses import fields

import pytest
import tiny_models
import torch
from kv.runs import GUIDANCE, STEPS, apply, prompts, record, sample, start, tune
from palimpsest.nodes import host
from palimpsest.nodes.inversion import ALGORITHM_1, EQUATION_4
from palimpsest.nodes.inversion.ddim import InvertSettings, descend
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv import apply_node, tune_node, tuning
from palimpsest.nodes.kv.modes import MODES
from palimpsest.nodes.kv.nodes import ApplyKV, PromptLines, TuneKV
from palimpsest.nodes.kv.settings import CONDITIONAL, PAPER, WEIGHTS, ApplySettings, TuneSettings

pytestmark = pytest.mark.usefixtures("inference")


# ---- settings

TUNING = {
    "guidance": 5.5,
    "tune_with": CONDITIONAL,
    "layers": "encoder",
    "start_percent": 0.05,
    "inner_steps": 7,
    "learning_rate": 0.3,
    "tolerance": 0.002,
    "warm_start": False,
    "keep_source": True,
    "end_percent": 0.85,
    "learn": WEIGHTS,
    "rank": 12,
    "keyframes": 2,
    "batch_steps": 3,
    "auto_layers": False,
}
EDITING = {
    "mode": "frozen",
    "strength": 0.3,
    "source_guidance": 4.0,
    "start_percent": 0.9,
    "end_percent": 0.95,
    "layers": "middle",
    "look_ahead": 0.5,
}


class Arrived(Exception):
    """Carries what a node handed on."""


def hand_back(*args, **kwargs):
    raise Arrived(args, kwargs)


@pytest.mark.parametrize("keep_source", [True, False])
def test_every_input_of_tune_kv_arrives_in_the_field_of_its_name(monkeypatch, keep_source):
    monkeypatch.setattr(tune_node, "tune", hand_back)
    chosen = TUNING | {"keep_source": keep_source}
    sockets = {"model": "m", "trajectory": host.Trajectory((1.0, 0.0), torch.zeros(2, 1), 1.0, "", ""), "positive": "p"}
    monkeypatch.setattr(tune_node.latent_preview, "prepare_callback", lambda model, steps: (model, steps))
    with pytest.raises(Arrived) as arrived:
        TuneKV.execute(**sockets, negative="n", mask="k", preset="as set below", **chosen)
    (model, trajectory, positive, negative, settings), named = arrived.value.args
    assert (model, trajectory, positive, negative) == ("m", sockets["trajectory"], "p", "n")
    assert (named["callback"], named["mask"]) == (("m", 1), "k")
    assert settings.named() == chosen


def test_every_input_of_apply_kv_arrives_in_the_field_of_its_name(monkeypatch):
    monkeypatch.setattr(apply_node, "apply", hand_back)
    with pytest.raises(Arrived) as arrived:
        ApplyKV.execute("m", "kv", preset="as set below", mask="mask", source_mask="source", **EDITING)
    (model, kv, settings, mask, source_mask), _ = arrived.value.args
    assert (model, kv, mask, source_mask) == ("m", "kv", "mask", "source")
    assert settings.named() == EDITING


@pytest.mark.parametrize(("node", "settings"), [(TuneKV, TuneSettings), (ApplyKV, ApplySettings)])
def test_defaults_of_settings_are_those_of_the_node(node, settings):
    inputs = {entry.id: entry for entry in node.define_schema().inputs}
    for field in fields(settings):
        default = inputs[field.name].default
        assert field.default == (inputs[field.name].options[0] if default is None else default), field.name


@pytest.mark.parametrize(("preset", "guidance"), [(PAPER, 1.0), (EQUATION_4, 1.0), (ALGORITHM_1, 7.5)])
def test_the_papers_presets_replace_the_values(tuned, preset, guidance):
    model, _, trajectory, *_ = tuned
    kv = tune(model, trajectory, preset=preset, layers="middle", inner_steps=0)[0]
    assert {layer.block for layer in kv.layers} == {"output"}
    assert kv.info["inner_steps"] == 10
    assert kv.info["guidance"] == guidance
    noise = start(model, trajectory)
    by_name = apply(model, kv, preset=preset, **EDITING)
    assert torch.equal(sample(by_name, noise), sample(apply(model, kv, start_percent=0.4), noise))


def test_the_papers_presets_have_one_name_in_all_three_stages():
    nodes = [{entry.id: entry for entry in node.define_schema().inputs} for node in (Invert, TuneKV, ApplyKV)]
    assert all({ALGORITHM_1, EQUATION_4} < set(inputs["preset"].options) for inputs in nodes)
    found = [InvertSettings.of({"preset": name, "steps": 3, "guidance": 2.0}) for name in (ALGORITHM_1, EQUATION_4)]
    assert [(each.steps, each.guidance) for each in found] == [(50, 7.5), (50, 1.0)]
    assert InvertSettings.of({"preset": "as set above", "steps": 3}).steps == 3


# ---- what changes


@pytest.mark.parametrize(("change", "guidance"), [("action", 3.0), ("colour or material", 1.0), ("species", 3.0)])
def test_what_changes_sets_the_values_of_its_kind(tuned, change, guidance):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    by_name = apply(model, kv, what_changes=change, **EDITING | {"layers": "all", "strength": 0.5, "look_ahead": 0.0})
    by_hand = apply(model, kv, "extend", source_guidance=guidance, start_percent=0.1, end_percent=0.95, strength=0.5)
    assert torch.equal(sample(by_name, noise), sample(by_hand, noise))


def test_what_changes_says_what_it_set_and_asks_for_its_mask(tuned):
    model, _, _, kv, _ = tuned

    def told(**chosen):
        return ApplyKV.execute(model, kv, **chosen).ui["text"][0]

    assert "place: mode extend, source_guidance 3.0, start_percent 0.1; connect source_mask" in told(
        what_changes="place"
    )
    assert "connect" not in told(what_changes="place", source_mask=torch.ones(1, 64, 64))
    assert "mode" not in told()
    with pytest.raises(ValueError, match="leave one of them"):
        apply(model, kv, preset=ALGORITHM_1, what_changes="action")


@pytest.mark.parametrize("mode", ["recompute", "frozen"])
def test_source_guidance_beside_what_was_learned_is_said(tuned, mode):
    model, _, _, kv, _ = tuned

    def told(**chosen):
        return ApplyKV.execute(model, kv, **chosen).ui["text"][0]

    assert f"source_guidance 3 burns in what mode {mode} shows: set it to 1" in told(mode=mode)
    assert "burns" not in told(mode=mode, source_guidance=1.0)
    assert "burns" not in told(mode="extend", source_guidance=10.0)


# ---- sampling


def draw(model, noise, **settings):
    """DDIM from inverted noise."""
    return host.sample(model, descend, noise, **settings)


def test_strength_0_is_the_model_itself(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    assert torch.equal(sample(apply(model, kv, strength=0.0), noise), sample(model, noise))


def test_untrained_embeddings_change_no_bit(tuned):
    model, _, trajectory, *_ = tuned
    kv, _ = tuning.tune(model, trajectory, *prompts(), TuneSettings(guidance=GUIDANCE, inner_steps=0))
    noise = start(model, trajectory)
    assert torch.equal(sample(apply(model, kv), noise), sample(model, noise))


@pytest.mark.parametrize("mode", list(MODES))
def test_the_unpatched_model_is_untouched_by_its_patched_clone(tuned, mode):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    before = sample(model, noise)
    edited = sample(apply(model, kv, mode), noise)
    assert not torch.equal(edited, before)
    assert torch.equal(sample(model, noise), before)
    assert torch.equal(sample(apply(model, kv, mode), noise), edited)


def test_looking_ahead_shows_the_source_of_a_later_step(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    assert [kv.ahead(i, 0.5) for i in range(STEPS)] == [2, 3, 3, 3]

    def edit(mode, look_ahead):
        return sample(apply(model, kv, mode, look_ahead=look_ahead), noise)

    assert not torch.equal(edit("extend", 0.5), edit("extend", 0.0))
    assert torch.equal(edit("recompute", 0.5), edit("recompute", 0.0))  # has no use for the source


def test_source_guidance_pushes_away_from_the_picture_without_the_source(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    positive, negative = prompts()

    def one_step(patched, guidance):
        levels = torch.tensor([trajectory.sigmas[0], 0.0])
        return draw(patched, noise, sigmas=levels, positive=positive, negative=negative, guidance=guidance)

    for guidance in (GUIDANCE, 1.0):  # at guidance 1 the host runs without the negative prompt
        only = negative if guidance != 1.0 else positive
        levels = torch.tensor([trajectory.sigmas[0], 0.0])
        shown, hidden = (draw(m, noise, sigmas=levels, positive=only) for m in (apply(model, kv, "recompute"), model))
        wanted = one_step(apply(model, kv, "recompute"), guidance) + 3.0 * (shown - hidden)
        found = one_step(apply(model, kv, "recompute", source_guidance=4.0), guidance)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_ancestral"])
def test_any_sampler_schedule_and_step_count(tuned, sampler):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    out = sample(apply(model, kv), noise, steps=7, sampler=sampler, scheduler="karras")
    assert torch.isfinite(out).all()


def test_the_window_of_steps(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    plain = sample(model, noise)
    assert torch.equal(sample(apply(model, kv, start_percent=0.4, end_percent=0.5), noise), plain)  # between two steps
    assert not torch.equal(sample(apply(model, kv, start_percent=0.5), noise), plain)
    assert torch.equal(sample(apply(model, kv, layers="encoder"), noise), plain)  # tuned in the decoder only


def test_a_black_mask_is_the_model_itself_and_a_white_one_the_whole_edit(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    assert torch.equal(sample(apply(model, kv, mask=torch.zeros(1, 37, 91)), noise), sample(model, noise))
    white = sample(apply(model, kv, mask=torch.ones(64, 64)), noise)
    torch.testing.assert_close(white, sample(apply(model, kv), noise), rtol=1e-4, atol=1e-4)


def test_embeddings_of_one_picture_serve_a_batch(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    three = sample(apply(model, kv), noise.repeat(3, 1, 1, 1))
    torch.testing.assert_close(three[2:], sample(apply(model, kv), noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["extend", "recompute"])
@pytest.mark.parametrize("guided", [True, False])
def test_two_applications_chain(tuned, guided, mode):
    model, _, trajectory, kv, _ = tuned
    noise, guidance = start(model, trajectory), GUIDANCE if guided else 1.0
    once = sample(apply(model, kv, mode), noise, guidance)
    twice = sample(apply(apply(model, kv, mode), kv, mode), noise, guidance)
    assert not torch.equal(once, twice)


def test_another_nodes_replacement_still_acts(tuned):
    model, _, trajectory, kv, _ = tuned
    layer, seen = kv.layers[0], []

    def theirs(query, key, value, options):
        seen.append(key.shape)
        return torch.zeros_like(query)

    other = model.clone()
    other.set_model_attn1_replace(theirs, layer.block, layer.number)
    sample(apply(other, kv), start(model, trajectory))
    assert len(seen) == STEPS


def test_wrong_sizes_and_batches_are_refused_with_a_way_out(tuned):
    model, _, trajectory, kv, _ = tuned
    with pytest.raises(ValueError, match=r"latent of 8 x 8, sampling runs at 8 x 12.*resize"):
        sample(apply(model, kv), torch.randn(1, 4, 12, 8))
    two = tune(model, record(model, tiny_models.latent(2)))[0]
    with pytest.raises(ValueError, match="tuned to 2 pictures, the sampled batch has 3"):
        sample(apply(model, two), torch.randn(3, 4, 8, 8))
    with pytest.raises(ValueError, match=r"another architecture.*does not have|has with"):
        apply(tiny_models.unet("sdxl"), kv)
    for start_percent in (0.1, 0.9):
        with pytest.raises(ValueError, match="leave no step between them"):
            apply(model, kv, start_percent=start_percent, end_percent=0.1)
    with pytest.raises(ValueError, match="NaN"):
        apply(model, kv, mask=torch.full((1, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="keep_source on"):
        apply(model, tune(model, trajectory, keep_source=False)[0], "frozen")


# ---- many prompts


def test_lines_become_prompts():
    assert PromptLines.execute("sitting \n\n# not this\nlying", "a cat {} here").args[0] == [
        "a cat sitting here", "a cat lying here",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="has no"):
        PromptLines.execute("sitting", "a cat")
    with pytest.raises(ValueError, match="no prompt"):
        PromptLines.execute("\n # \n", "{}")
