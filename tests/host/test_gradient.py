"""The cheap gradient step: no weight copied, no layer run twice, the same numbers to the bit."""

from functools import partial
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from palimpsest.nodes import host
from palimpsest.nodes.host import gradient as tuning_runtime
from palimpsest.nodes.inversion import ddim as inversion
from palimpsest.nodes.kv.settings import TuneSettings
from palimpsest.nodes.kv.tuning import tune as tune_kv
from torch import nn

STEPS = 3

pytestmark = pytest.mark.usefixtures("inference")


def record(model):
    levels = inversion.descending_schedule(model, "normal", STEPS, None)
    positive, negative = tiny_models.prompt(1), tiny_models.prompt(2)
    latent = tiny_models.latent()["samples"]
    return inversion.invert(model, latent, positive, negative, levels=levels)


def tune(model, trajectory, negative=None, **changes):
    settings = TuneSettings(**{"inner_steps": 3, "learning_rate": 0.05, "tolerance": 0.0} | changes)
    return tune_kv(model, trajectory, tiny_models.prompt(1), negative or tiny_models.prompt(2), settings)


def count_layers(monkeypatch):
    """How often each class of layer ran through the cache's own door."""
    ran = []
    plain = tuning_runtime.run_layer
    monkeypatch.setattr(tuning_runtime, "run_layer", lambda layer, *args: (ran.append(layer), plain(layer, *args))[1])
    return ran


@pytest.mark.parametrize("changes", [{}, {"batch_steps": 3}, {"keyframes": 2}, {"warm_start": False}], ids=str)
@pytest.mark.parametrize("tokens", [7, 40], ids=["one call", "cond and uncond apart"])
def test_the_cached_prefix_changes_no_bit_and_runs_once(monkeypatch, changes, tokens):
    model = tiny_models.unet()
    trajectory, negative = record(model), tiny_models.prompt(2, tokens)
    ran = count_layers(monkeypatch)
    kv, rebuilt = tune(model, trajectory, negative, **changes)
    with_cache = len(ran)
    ran.clear()
    monkeypatch.setattr(tuning_runtime, "prefix_layers", lambda *_: frozenset({-1}))
    kv_full, rebuilt_full = tune(model, trajectory, negative, **changes)
    assert torch.equal(rebuilt, rebuilt_full)
    for a, b in zip((*kv.learned, *kv.source), (*kv_full.learned, *kv_full.source), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    if with_cache:  # ComfyUI 0.18 asks the patch for some layers only
        assert with_cache < 0.85 * len(ran)


def test_the_prefix_ends_before_the_first_learned_transformer():
    model = tiny_models.unet()
    network = model.model.diffusion_model
    layers = host.self_attention_layers(model)
    first = next(layer for layer in layers if layer.block == "output")
    ids = tuning_runtime.prefix_layers(network, first)
    block = network.output_blocks[first.number]
    assert id(block[0]) in ids
    assert not {id(layer) for layer in block[1:]} & ids
    assert all(id(layer) in ids for block in network.input_blocks for layer in block)
    assert not any(id(layer) in ids for block in network.output_blocks[first.number + 1 :] for layer in block)


@pytest.mark.parametrize("kind", ["patches", "patches_replace", "control"])
def test_the_full_pass_runs_where_others_look_at_the_prefix(monkeypatch, kind):
    model = tiny_models.unet()
    first = next(layer for layer in host.self_attention_layers(model) if layer.block == "output")
    assert tuning_runtime.prepare(model, first, True)[1].layers
    if kind == "control":
        prefix = tuning_runtime.prepare(model, first, False)[1]
    else:
        other = model.clone()
        if kind == "patches":
            other.set_model_input_block_patch(lambda h, options: h)
        else:
            other.set_model_attn2_replace(lambda q, k, v, options: q, "input", 1)
        prefix = tuning_runtime.prepare(other, first, True)[1]
    assert not prefix.layers


def test_no_weight_is_copied(monkeypatch):
    model = tiny_models.unet()
    trajectory = record(model)
    owned = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    sizes = {p.untyped_storage().nbytes() for p in model.model.parameters()}
    made, saved = [], []
    alias = tuning_runtime.alias
    monkeypatch.setattr(tuning_runtime, "alias", lambda w: made.append(alias(w)) or made[-1])
    parameters = {tuple(p.shape) for p in model.model.diffusion_model.parameters() if p.ndim > 1}

    def keep(tensor):
        if tuple(tensor.shape) in parameters and tensor.untyped_storage().nbytes() in sizes:
            saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        tune(model, trajectory)
    assert made
    assert all(weight.untyped_storage().data_ptr() in owned and not weight.is_inference() for weight in made)
    assert saved
    assert set(saved) <= owned
    assert not any(getattr(m, "weight_function", []) for m in model.model.modules())


def test_a_model_that_cannot_be_brought_into_ordinary_memory_is_refused():
    dynamic = SimpleNamespace(is_dynamic=lambda: True, cached_patcher_init=None)
    with pytest.raises(ValueError, match="--disable-dynamic-vram"):
        host.single_device(dynamic)
    dynamic.cached_patcher_init, dynamic.get_non_dynamic_delegate = (print, ()), lambda: "delegate"
    assert host.single_device(dynamic) == "delegate"


def test_an_alias_is_the_same_memory_and_quantised_weights_are_refused():
    weight = torch.randn(4, 6).T[1:]
    with torch.inference_mode(False):
        other = tuning_runtime.alias(weight)
        assert torch.equal(other, weight)
        assert (other.data_ptr(), other.stride()) == (weight.data_ptr(), weight.stride())
        assert weight.is_inference()
        assert not other.is_inference()
        weight._model_dtype = torch.float16
        assert tuning_runtime.alias(weight)._model_dtype == torch.float16

        class Quantised(torch.Tensor):
            pass

        with pytest.raises(TypeError, match="Quantised"):
            tuning_runtime.alias(weight.as_subclass(Quantised))


def test_weights_that_cannot_be_aliased_are_copied_and_come_out_the_same(monkeypatch):
    model = tiny_models.unet()
    trajectory = record(model)
    wanted = tune(model, trajectory)[1]
    monkeypatch.setattr(tuning_runtime, "nn", type("nn", (), {"Parameter": int, "Module": nn.Module}))
    found = tune(model, trajectory)[1]  # no weight passes for a plain tensor now
    assert torch.equal(found, wanted)
    assert not model.weight_wrapper_patches


def test_a_tuning_leaves_no_trace_when_it_breaks():
    model = tiny_models.unet()
    trajectory = record(model)
    parameters = {name: id(p) for name, p in model.model.named_parameters()}

    def breaks(*_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        tune_kv(model, trajectory, tiny_models.prompt(1), tiny_models.prompt(2), TuneSettings(), report=breaks)
    assert {name: id(p) for name, p in model.model.named_parameters()} == parameters


def test_cached_blocks_run_once_a_step_and_anew_for_another_nodes_pass():
    """Another node's pass may have patches of its own: it runs, and nothing of it is kept."""
    ran = []

    def forward(x, transformer_options, name):
        ran.append(name)
        return x + 1 if name == "last" else (x, 2 * x)

    blocks, x = tuning_runtime.CachedBlocks("last"), torch.ones(2, 3)
    first, last = (partial(blocks.run, name, partial(forward, name=name)) for name in ("first", "last"))
    own = {"transformer_options": {"uuids": ["a"]}}
    again = {"transformer_options": {"uuids": ["a"], tuning_runtime.AGAIN: True}}
    assert torch.equal(last(first(x, **own)[0], **own), x + 1)
    hollow = first(x, **own)
    assert [each.shape for each in hollow] == [x.shape, x.shape]
    assert not any(each.any() for each in hollow)
    kept = last(hollow[0], **own)
    assert torch.equal(kept, x + 1)
    kept.zero_()  # the host's blocks write into their inputs
    assert torch.equal(last(hollow[0], **own), x + 1)
    assert ran == ["first", "last"]
    assert torch.equal(last(first(3 * x, **again)[1], **again), 6 * x + 1)
    assert torch.equal(last(hollow[0], **own), x + 1)
    assert ran == ["first", "last"] * 2
    blocks.forget()
    assert torch.equal(last(first(5 * x, **own)[0], **own), 5 * x + 1)
