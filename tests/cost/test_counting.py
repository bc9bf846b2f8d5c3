"""The instruments of the cost benchmark: what is held at once, and the host's own trainer without storage."""

import pytest
import tiny_transformers
import torch
from benchmarks import counting, counting_host_lora, counting_lora, counting_transformers
from benchmarks.counting_memory import Memory


def test_the_peak_is_what_is_held_at_once():
    weights = torch.nn.Linear(8, 8, device="meta")
    with Memory(weights) as memory:
        x = torch.ones(10, 8, device="meta")  # 320 bytes
        y = x * 2
        del x
        z = y[:5] + 1  # a view holds nothing
        assert (memory.held, memory.peak) == (480, 640)
        del y, z
        assert memory.held == 0
        loss = weights(torch.ones(100, 8, device="meta")).square().sum()  # in, out, its square; the sum
    assert memory.peak == 3 * 3200 + 4
    with memory:
        loss.backward()
    assert memory.held == 4 + 8 * 8 * 4 + 8 * 4  # the loss and the gradients


def test_autocast_on_meta_tensors_is_cudas():
    x = torch.ones(2, 4, device="meta")
    with counting_host_lora.Autocast("meta", torch.bfloat16):
        half = torch.nn.functional.linear(x, torch.ones(4, 4, device="meta"))
        assert (half.dtype, torch.nn.functional.layer_norm(half, (4,)).dtype) == (torch.bfloat16, torch.float32)
        assert (half @ half.T).dtype == (half + half).dtype == torch.bfloat16


@pytest.mark.skipif(counting_host_lora.host_trainer()[0] is None, reason="this host has no trainer of its own")
def test_the_hosts_trainer_learns_in_every_layer_and_bias_and_takes_more_for_a_step():
    family = counting.TINY
    model = counting.build(family)
    run = counting_host_lora.trained(family, "rank 32", 1)
    network = [m for m in model.model.diffusion_model.modules() if hasattr(m, "weight_function")]
    wide = sum(m.weight is not None and m.weight.ndim > 1 for m in network)
    flat = sum(m.weight is not None and m.weight.ndim == 1 for m in network)
    biases = sum(getattr(m, "bias", None) is not None for m in network)
    assert len(run.tensors) == 3 * wide + flat + biases  # up, down and alpha; a change; a change
    assert {tensor.dtype for tensor in run.tensors} == {torch.bfloat16}
    ours = counting_lora.train(model, family, counting_lora.SETTINGS, 1, counting.counting(model.model)).cost
    assert ours.flops < run.cost.flops
    assert ours.saved < run.cost.saved


def test_a_host_without_a_trainer_is_told(monkeypatch, capsys):
    monkeypatch.setattr(counting_host_lora, "NEEDED", ("TrainLoraNode", "grandfather"))
    assert counting_host_lora.steps(counting.TINY) == {}
    assert "left out: comfy_extras.nodes_train has no grandfather" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["qwen", "zimage", "flux", "anima"])
def test_a_transformers_lines_are_counted(kind):
    """Everything the benchmark counts of the families at full size, of a small one."""
    tiny_transformers.require_blocks(kind)
    guidance = 1.0 if kind == "flux" else 4.0
    pooled = tiny_transformers.EVERY[kind].pooled
    small = counting_transformers.Transformer(
        kind, kind, {}, tokens=32, text=48, guidance=guidance, pooled=pooled, cells=16
    )
    costs, sizes = counting_transformers.count(small)
    plain = costs[counting_transformers.PLAIN]
    assert {*counting_transformers.STEPS, counting_transformers.PASS, counting_transformers.ITERATION} < costs.keys()
    assert all(cost.flops > 0 for cost in costs.values())
    iteration = costs[counting_transformers.ITERATION].flops  # forth, again and back, of the blocks that learn
    assert 0.3 * plain.flops < iteration < 3 * plain.flops
    assert min(sizes.values()) > 0
