"""The host's caches of steps beside a source: its passes run all the same, and the edit is cached as without them."""

import pytest
import tiny_models
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from harness import assert_acts, assert_close
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.host import reference
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from tiny_transformers import latent, own_run, prompt, sample

STEPS, SKIPPING = 6, 3.0

pytestmark = pytest.mark.usefixtures("inference")


def cached(model, node):
    """A clone whose steps the host's cache skips wherever it can."""
    return node.execute(model, SKIPPING, 0.0, 0.95, False).args[0]


def drawn(model, family="flux", text=3, runs=None):
    """An edit; runs gathers how often the network is asked."""

    def count(executor, *args, **kwargs):
        runs.append(1)
        return executor(*args, **kwargs)

    if runs is not None:
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
    return sample(model, prompt(family, text), prompt(family, 2), latent(family), steps=STEPS, cfg=1.0)


def tuned(model, trajectory, **settings):
    given = {"positive": prompt("flux", 1), "inner_steps": 0, "layers": "all"}
    return tiny_models.execute(TuneKV, model=model, trajectory=trajectory, **given | settings)[0]


def applied(model, kv, **settings):
    given = {"start_percent": 0.0, "source_guidance": 1.0, "layers": "all"} | settings
    return tiny_models.execute(ApplyKV, model=model, kv=kv, **given)[0]


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_a_source_is_recorded_as_without_a_cache(models, node):
    model = models("flux")
    trajectory, _ = own_run(model, "flux", steps=STEPS)
    plain, kv = tuned(model, trajectory), tuned(cached(model, node), trajectory)
    found = (drawn(applied(model, each)) for each in (plain, kv))
    assert torch.equal(*found)


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_a_pass_beside_each_step_runs_and_the_edit_is_still_cached(models, node, monkeypatch):
    model = models("flux")
    trajectory, _ = own_run(model, "flux", steps=STEPS)
    recorded = tuned(model, trajectory)
    monkeypatch.setattr(reference, "free_memory", lambda: 0)
    beside, skipping = tuned(model, trajectory), cached(model, node)
    runs = []
    found = drawn(applied(skipping, beside), runs=runs)
    assert_close(found, drawn(applied(skipping, recorded)))
    assert_acts(found, drawn(applied(model, beside)))
    assert len(runs) < 2 * STEPS


def test_features_are_met_beside_each_step(models):
    model = cached(models("flux"), EasyCacheNode)
    trajectory, _ = own_run(models("flux"), "flux", steps=STEPS)
    found = []
    for where in ("cached", "same step"):
        given = {"positive": prompt("flux", 1), "source_features": where, "blend_latents_until": 0.0}
        given["mask"] = torch.zeros(1, 96, 64)
        found.append(drawn(tiny_models.execute(FeatureBlend, model=model, trajectory=trajectory, **given)[0]))
    assert_close(*found)


def test_source_guidance_sees_the_edit_without_the_source(models):
    """Its row runs at every step, and the edit is skipped as often as without it."""
    model, runs, without = models("flux"), [], []
    kv = tuned(model, own_run(model, "flux", steps=STEPS)[0])
    model = cached(model, EasyCacheNode)
    plain = drawn(applied(model, kv), runs=without)
    assert_acts(drawn(applied(model, kv, source_guidance=3.0), runs=runs), plain)
    assert len(without) < STEPS
    assert len(runs) == STEPS + len(without)
