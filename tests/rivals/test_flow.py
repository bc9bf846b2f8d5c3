"""The ways of editing that the benchmarks compare on the pocket transformer: each draws, and costs what it says."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("inference")]


@pytest.fixture(scope="module")
def scenes(comfy_host_path):
    from benchmarks.flow_scenes import FlowScenes

    with torch.inference_mode():
        found = FlowScenes(32, 1, steps=2, narrow=True)
        found.empty = found.encode([None])
        return found


def test_every_way_edits_and_rebuilds(scenes):
    from rivals import flow

    edit = scenes.edit("colour")
    for key, (name, way) in flow.METHODS.items():
        prepared = way(scenes, 3.0)
        for latent in (prepared.draw(edit.prompt), prepared.rebuild()):
            assert latent.shape == scenes.latent["samples"].shape and latent.isfinite().all(), name
        assert (prepared.kept > 0) == (not key.startswith("flow-edit")), name


def test_every_region_acts_in_its_mask(scenes):
    from cross_attention import benchmark

    edit = benchmark.edit_of(scenes, benchmark.TWO)
    (case,) = benchmark.cases(scenes, edit, 3.0)
    colour, place = case.regions
    assert torch.equal(colour.mask + place.mask, torch.ones_like(colour.mask))
    plain, _ = benchmark.draw(case, "prompt", benchmark.prompt_only, scenes.model)
    for key, (name, way) in benchmark.FLUX.items():
        latent, leakage = benchmark.draw(case, key, way, scenes.model)
        assert latent.shape == plain.shape and latent.isfinite().all(), name
        assert (leakage == leakage) == (key not in ("set-mask", "phrase", "phrase-alone", "phrase-blend")), name
    words, _ = benchmark.draw(case, "words", benchmark.attention_mask, scenes.model)
    assert (words != plain).any()
