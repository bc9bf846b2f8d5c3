"""What Feature Blend adds to the host's work, counted at full size: FLOPs, bytes and operations, never time."""

import pytest
import tiny_models
import torch
from benchmarks import counting
from benchmarks.counting import Calls, Cost, meta_host, sampling_step
from palimpsest.nodes.feature_blend import layers as layering
from palimpsest.nodes.feature_blend.nodes import FeatureBlend, TuneFeatureBlend
from palimpsest.nodes.host import reference

GUIDANCE = 7.5
FAMILIES = ("SD 1.5", "SDXL")
LOOK = 16  # small operations that find out whether a free latent is on the source's path
SETTINGS = {
    "paper": {"preset": "paper"},
    "object": {"preset": "PFB-Diff object", "mask": True},
    "default": {"mask": True},
    "everything": {"layers": "input, middle, output, out", "mask": True},
}


@pytest.fixture(scope="module")
def families() -> dict[str, Calls]:
    """Models without weights, whose plain steps are counted when a test first asks."""
    return {name: Calls(counting.build(counting.FAMILIES[name]), counting.FAMILIES[name]) for name in FAMILIES}


def step(calls: Calls, source_features: str = "cached", mask: bool = False, **settings) -> Cost:
    """A guided step of sampling with Feature Blend."""
    inputs = {"model": calls.model, "trajectory": calls.trajectory(1), "positive": calls.family.prompt()}
    if mask:
        inputs["mask"] = torch.ones(1, 64, 64).tril()
    with torch.inference_mode(), meta_host():
        patched = tiny_models.execute(FeatureBlend, source_features=source_features, **inputs | settings)[0]
    return sampling_step(patched, calls.family, GUIDANCE)


def ratio(cost: Cost, than: Cost) -> float:
    """The larger of the ratios of roofs on the two devices."""
    return max(cost.h200 / than.h200, cost.rtx4090 / than.rtx4090)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_cached_features_costs_at_most_a_fiftieth_more(families, family, name):
    calls = families[family]
    cost = step(calls, **SETTINGS[name])
    assert cost.flops == calls["plain"].flops
    assert ratio(cost, calls["plain"]) <= 1.02


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_the_same_step_cost_one_more_row(families, family):
    calls = families[family]
    cost = step(calls, "same step", **SETTINGS["default"])
    assert cost.flops == pytest.approx(1.5 * calls["plain"].flops, rel=1e-3)
    assert ratio(cost, calls["plain"]) <= 1.56


def test_a_feature_costs_one_operation(families):
    calls = families["SD 1.5"]
    layers = len(layering.feature_layers(calls.model))
    everything = SETTINGS["everything"] | {"mask": False, "alpha_inside": 0.5}  # a mask's weights are made once a run
    assert step(calls, **everything).ops - calls["plain"].ops <= layers + 3 + LOOK


def test_alphas_of_1_cost_nothing(families):
    calls = families["SD 1.5"]
    cost, plain = step(calls, alpha_outside=1.0, blend_latents_until=0.0), calls["plain"]
    assert (cost.flops, cost.bytes, cost.ops) == (plain.flops, plain.bytes, plain.ops)


def test_a_step_reads_back_one_number(families):
    held = SETTINGS["default"] | {"blend_latents_until": 1.0}
    assert step(families["SD 1.5"], **held).waits <= 1


def test_a_step_with_a_free_latent_reads_back_how_far_it_is_from_the_path(families):
    assert step(families["SD 1.5"], **SETTINGS["default"]).waits <= 2


@pytest.mark.parametrize(
    ("family", "text", "megabytes"),
    [
        ("SD 1.5", "input 8-11, middle, output 1-5", 4.1),
        ("SD 1.5", "output, out", 20.8),
        ("SDXL", "input 8, middle, output 1-2", 10.5),
        ("SDXL", "output, out", 81.3),
    ],
)
def test_cached_features_take_known_memory_a_level(families, family, text, megabytes):
    present = layering.feature_layers(families[family].model)
    side = families[family].family.pixels // 8
    numbers = sum(layer.elements(side, side) for layer in layering.parse(text, present))
    assert 2 * numbers / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_recording_is_one_row_a_level(families):
    calls = families["SD 1.5"]
    inputs = {"model": calls.model, "trajectory": calls.trajectory(3), "positive": calls.family.prompt()}
    with torch.inference_mode(), meta_host(), counting.counting(calls.model.model) as counter:
        tiny_models.execute(FeatureBlend, source_features="cached", preset="paper", **inputs)
    assert counter.cost.flops == pytest.approx(3 * calls["plain"].flops / 2, rel=1e-3)


def test_tuning_copies_no_weights(families, monkeypatch):
    calls = families["SD 1.5"]
    monkeypatch.setattr(reference, "free_memory", lambda: 1 << 40)
    prompt = calls.family.prompt()
    inputs = {"model": calls.model, "trajectory": calls.trajectory(1), "positive": prompt, "target_positive": prompt}
    with torch.inference_mode(), meta_host(), counting.counting(calls.model.model) as counter:
        tiny_models.execute(TuneFeatureBlend, negative=prompt, steps=1, **inputs)
    assert counter.cost.copied == 0
