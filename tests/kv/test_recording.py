"""Recording only: Tune KV without iterations keeps what mode extend shows, and nothing else."""

from dataclasses import replace

import folder_paths
import harness
import pytest
import tiny_models
import torch
from kv.runs import GUIDANCE, STEPS, apply, prompts, sample, start, tune
from palimpsest.nodes.host import gradient
from palimpsest.nodes.kv import files, fitting, tuning
from palimpsest.nodes.kv.nodes import ApplyKV, LoadKV, SaveKV, TuneKV
from palimpsest.nodes.kv.settings import CONDITIONAL, PAPER, WEIGHTS, TuneSettings
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("inference")


def recorded(model, trajectory, **changes):
    """(kv, what stands for a reconstruction, report) without a negative prompt."""
    inputs = {"model": model, "trajectory": trajectory, "positive": prompts()[0], "inner_steps": 0}
    kv, rebuilt, report = tiny_models.execute(TuneKV, **inputs | changes)
    return kv, rebuilt["samples"], report


def edited(model, kv, noise, **settings):
    """What Apply KV makes of another prompt in mode extend, without the border, which refuses NaN."""
    positive, negative = harness.edits()
    chosen = {"mode": "extend", "source_guidance": 1.0} | settings
    return harness.sample(ApplyKV.execute(model, kv, **chosen).args[0], noise, positive, negative, steps=STEPS)


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("settings", [{}, {"source_guidance": 4.0}, {"look_ahead": 0.3, "strength": 0.6}])
def test_extend_never_reads_what_was_learned(tuned, settings):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    spoilt = [None if piece is None else torch.full_like(piece, torch.nan) for piece in kv.learned]
    without = replace(kv, learned=tuple(spoilt), scalars=torch.full_like(kv.scalars, torch.nan))
    assert torch.equal(edited(model, without, noise, **settings), edited(model, kv, noise, **settings))


def test_recording_gives_the_picture_of_a_tuning_that_rebuilds_the_source(tuned):
    """A tuning takes the source from the path that it rebuilds: the nearer that is, the nearer the pictures are."""
    model, _, trajectory, *_ = tuned
    noise = start(model, trajectory)
    wanted = edited(model, recorded(model, trajectory)[0], noise)
    untuned, _ = tuning.tune(model, trajectory, *prompts(), TuneSettings(guidance=GUIDANCE, inner_steps=0))
    rebuilt = tune(model, trajectory, inner_steps=40, learning_rate=0.1)[0]
    far, near = (distance(edited(model, kv, noise), wanted) for kv in (untuned, rebuilt))
    assert near < 0.3 * far
    assert near < 0.02


def test_the_first_step_is_recorded_as_a_tuning_records_it(tuned):
    """There both stand on the inverted noise."""
    model, _, trajectory, kv, _ = tuned
    found = recorded(model, trajectory)[0]
    assert [piece is None for piece in found.source] == [False] * STEPS
    torch.testing.assert_close(found.source[0], kv.source[0], rtol=1e-3, atol=1e-3)


def test_it_is_one_pass_a_step_of_the_prompts_row_without_a_gradient(tuned, monkeypatch):
    model, _, trajectory, *_ = tuned
    calls = []

    def watch(function, args):
        calls.append((len(args["input"]), torch.is_grad_enabled() and not torch.is_inference_mode_enabled()))
        return function(args["input"], args["timestep"], **args["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(watch)

    def refuse(*_, **__):
        raise AssertionError("nothing is to be learned")

    monkeypatch.setattr(gradient, "prepare", refuse)
    monkeypatch.setattr(fitting.torch.optim, "Adam", refuse)
    monkeypatch.setattr(type(model), "get_non_dynamic_delegate", refuse, raising=False)
    _, rebuilt, report = recorded(watched, trajectory)
    assert calls == [(1, False)] * STEPS
    assert report.startswith("source recorded, nothing learned, for mode extend; ")
    torch.testing.assert_close(rebuilt, model.model.process_latent_out(trajectory.latents[-1].clone()))


@pytest.mark.parametrize("mode", ["recompute", "frozen"])
def test_the_other_modes_are_refused_by_name(tuned, mode):
    model, _, trajectory, *_ = tuned
    kv = recorded(model, trajectory)[0]
    wanted = f"mode '{mode}' shows what was learned, .* take mode extend, or tune with inner_steps above 0"
    with pytest.raises(ValueError, match=wanted):
        apply(model, kv, mode)
    with pytest.raises(ValueError, match="mode 'recompute'"):
        apply(model, kv, "extend", preset=PAPER)


def test_what_was_learned_without_the_source_serves_recompute_alone(tuned):
    model, _, trajectory, *_ = tuned
    kv = tune(model, trajectory, inner_steps=1, keep_source=False)[0]
    assert files.describe_kv(kv).endswith("; modes recompute")
    with pytest.raises(ValueError, match="mode 'extend' needs the source's own keys and values"):
        apply(model, kv, "extend")


def test_a_tuning_of_weights_alone_still_serves_all_modes(tuned):
    model, _, trajectory, *_ = tuned
    kv = tune(model, trajectory, inner_steps=1, learn=WEIGHTS)[0]
    assert kv.weights_only
    assert files.describe_kv(kv).endswith("; modes extend, recompute, frozen")


def test_a_file_holds_what_was_recorded_and_says_so(tuned, tmp_path, monkeypatch):
    place = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, files.SHELF.folder, place)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    model, _, trajectory, learned, _ = tuned
    kv = recorded(model, trajectory)[0]
    names = [SaveKV.execute(each).args[0] for each in (kv, learned)]
    with safe_open(tmp_path / names[0], framework="pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"source", "scalars", "noise"}  # noqa: SIM118
        assert '"holds": ["source"]' in file.metadata()["info"]
    with safe_open(tmp_path / names[1], framework="pt") as file:
        assert '"holds": ["learned", "source"]' in file.metadata()["info"]
    again, report, noise, _ = LoadKV.execute(names[0]).args
    assert report.endswith("; modes extend")
    assert torch.equal(edited(model, again, noise["samples"]), edited(model, kv, noise["samples"]))
    with pytest.raises(ValueError, match="mode 'frozen' shows what was learned"):
        apply(model, again, "frozen")


def test_span_keyframes_and_rank_act_as_in_a_tuning(tuned):
    model, _, trajectory, *_ = tuned

    def kept(**changes):
        kv = recorded(model, trajectory, **changes)[0]
        return kv, [piece is not None for piece in kv.source]

    assert kept(start_percent=0.5)[1] == [False, False, True, True]
    assert kept(keyframes=2)[1] == [True, False, True, True]
    assert kept(batch_steps=3)[1] == [True] * STEPS
    small, full = kept(rank=1)[0], kept()[0]
    assert small.bytes < full.bytes
    noise = start(model, trajectory)
    for kv in (small, kept(keyframes=2)[0]):
        assert torch.isfinite(edited(model, kv, noise)).all()


def test_what_has_no_meaning_without_learning(tuned):
    model, _, trajectory, *_ = tuned
    with pytest.raises(ValueError, match="auto_layers compares what is learned: set inner_steps above 0"):
        recorded(model, trajectory, auto_layers=True)
    kv = recorded(model, trajectory, keep_source=False, guidance=7.5, tune_with=CONDITIONAL)[0]
    assert kv.guidance is None
    assert kv.keeps_source


def test_the_model_is_left_as_it_was(tuned):
    model, _, trajectory, *_ = tuned
    noise = start(model, trajectory)
    before = sample(model, noise)
    recorded(model, trajectory)
    assert torch.equal(sample(model, noise), before)
