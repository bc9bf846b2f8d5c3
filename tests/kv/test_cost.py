"""What the pack adds to the host's work, counted on SD 1.5 at full size: FLOPs, bytes and operations, never time."""

import pytest
import torch
from benchmarks import counting
from benchmarks.counting import STEPS, Calls, Cost
from comfy.model_patcher import ModelPatcher

SD15 = counting.FAMILIES["SD 1.5"]
DECODER_LAYERS = 9


@pytest.fixture(scope="module")
def calls() -> Calls:
    """Counts of SD 1.5, each made when a test first asks for it."""
    return Calls(counting.build(SD15), SD15)


def ratio(cost: Cost, than: Cost) -> float:
    """The larger of the ratios of roofs on the two devices."""
    return max(cost.h200 / than.h200, cost.rtx4090 / than.rtx4090)


# ---- the counter ----------------------------------------------------------------------------------------------------


def count(run, *tensors, weights=()) -> Cost:
    with counting.OneAttention(), counting.counting(torch.nn.ParameterList(weights)) as counter:
        run(*tensors)
    return counter.cost


def meta(*shape, grad=False):
    return torch.empty(shape, dtype=torch.float16, device="meta", requires_grad=grad)


def test_a_product_counts_its_multiplications_and_its_three_matrices():
    cost = count(torch.mm, meta(3, 5), meta(5, 7))
    assert (cost.flops, cost.bytes, cost.ops) == (2 * 3 * 5 * 7, 2 * (15 + 35 + 21), 1)


def test_views_are_free_and_expanded_memory_counts_once():
    cost = count(lambda x: x.expand(4, 6).T.add(1), meta(1, 6))
    assert (cost.bytes, cost.ops) == (2 * (6 + 24), 1)


def test_the_roof_takes_the_slower_of_arithmetic_and_memory():
    rate, bandwidth = counting.DEVICES["H200"]
    assert count(torch.mm, meta(4096, 4096), meta(4096, 4096)).h200 == 2 * 4096**3 / rate
    assert count(torch.add, meta(4096), meta(4096)).h200 == 2 * 3 * 4096 / bandwidth


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_attention_is_one_operation_of_two_products(masked, inference):
    q, k = meta(2, 8, 64, 40), meta(2, 8, 96, 40)
    bias = meta(1, 1, 64, 96) if masked else None
    with torch.inference_mode(inference):
        cost = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=bias))
    assert cost.ops == 1 and cost.flops == 2 * 2 * (2 * 8 * 64 * 96 * 40)
    assert 0 <= cost.bytes - 2 * (2 * q.numel() + 2 * k.numel() + masked * 64 * 96) < 64


def test_the_backward_pass_of_attention_is_one_operation_of_five_products():
    q, k = meta(2, 8, 64, 40, grad=True), meta(2, 8, 96, 40, grad=True)
    out = []
    forward = count(lambda: out.append(torch.nn.functional.scaled_dot_product_attention(q, k, k)))
    backward = count(lambda: torch.autograd.grad(out[0], (q,), torch.empty_like(out[0])))
    assert backward.flops == forward.flops * 2.5
    assert backward.ops == 1


def test_what_autograd_keeps_leaves_weights_out():
    weight, x = meta(5, 7), meta(3, 5, grad=True)
    assert count(lambda: (x @ weight).exp(), weights=[weight]).saved == 2 * 21  # exp keeps its result


def test_copies_of_weights_are_seen():
    weight = meta(5, 7)
    assert count(lambda: weight.clone(), weights=[weight]).copied == 2 * 35
    assert count(lambda: weight.float(), weights=[weight]).copied == 2 * 35
    assert count(lambda: weight.T, weights=[weight]).copied == 0


# ---- the host -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "flops", "ops"), [("SD 1.5", 0.803e12, 717), ("SDXL", 6.761e12, 1702)])
def test_a_forward_pass_of_the_full_size_u_net(name, flops, ops):
    family = counting.FAMILIES[name]
    model = counting.build(family)
    layout, side = family.layout, family.pixels // 8
    y = meta(1, 2816) if layout["adm_in_channels"] else None
    options = {"optimized_attention_override": counting.fused}
    with torch.inference_mode(), counting.meta_host(), counting.counting(model.model) as counter:
        model.model.diffusion_model(
            meta(1, 4, side, side), meta(1), meta(1, 77, layout["context_dim"]), y, transformer_options=options
        )
    assert counter.cost.flops == pytest.approx(flops, rel=1e-3)
    assert counter.cost.ops == pytest.approx(ops, rel=0.02)


def test_a_guided_step_is_two_rows_of_the_network(calls):
    assert calls["plain"].flops == pytest.approx(2 * 0.803e12, rel=1e-3)


def test_inversion_costs_little_more_than_half_of_guided_sampling(calls):
    assert ratio(calls["inversion"], calls["plain"]) <= 0.6


# ---- Apply KV -------------------------------------------------------------------------------------------------------


def test_recompute_adds_no_flops_and_little_memory_traffic(calls):
    assert calls["recompute"].flops == calls["plain"].flops
    assert ratio(calls["recompute"], calls["plain"]) <= 1.015


def test_recompute_adds_few_operations_a_layer(calls):
    assert calls["recompute"].ops - calls["plain"].ops <= 3 * DECODER_LAYERS


@pytest.mark.parametrize(("mode", "limit"), [("frozen", 1.016), ("extend", 1.095)])
def test_showing_the_source_costs(calls, mode, limit):
    assert ratio(calls[mode], calls["plain"]) <= limit


def test_source_guidance_costs_one_more_row(calls):
    extra = calls["recompute guided"].flops - calls["recompute"].flops
    assert extra == pytest.approx(calls["plain"].flops / 2, rel=1e-3)


def test_outside_its_percents_apply_kv_costs_nothing(calls):
    outside, plain = calls["outside"], calls["plain"]
    assert (outside.flops, outside.bytes, outside.ops) == (plain.flops, plain.bytes, plain.ops)


def test_a_step_reads_back_one_number_at_most(calls):
    assert calls["plain"].waits == 0
    assert calls["recompute"].waits <= 1


# ---- Tune KV --------------------------------------------------------------------------------------------------------

caches_every_layer = pytest.mark.skipif(
    not hasattr(ModelPatcher, "set_model_middle_block_after_patch"),
    reason="hosts before 0.24 ask layer patches for layers of other packs only: nothing is cached there",
)


@caches_every_layer
def test_an_iteration_runs_the_network_from_the_first_learned_layer_on(calls):
    assert calls["iteration"].flops == pytest.approx(1.09e12, rel=0.01)


@caches_every_layer
def test_the_cache_saves_a_fifth_of_an_iteration(calls):
    assert ratio(calls["iteration"], calls["iteration uncached"]) <= 0.8


@caches_every_layer
def test_an_iteration_stays_below_its_ceiling(calls):
    assert ratio(calls["iteration"], calls["plain"]) <= 0.81
    assert calls["iteration"].ops <= 1000


@caches_every_layer
def test_tuning_stays_below_its_ceiling(calls):
    """0.25 + 0.8 n = 8.25 at n = 10 would leave no time for the prefix, the walk that finds the source's keys, and the
    forward pass after the last update: 0.2, 0.35 and 0.4 of a plain step."""
    tuning = (calls["step"] + calls["iteration"] * 9) * STEPS
    assert ratio(tuning, calls["plain"] * STEPS) <= 9.0


def test_tuning_copies_no_weights(calls):
    assert calls.tuning("", 1, 2).copied == 0


def test_an_iteration_keeps_half_a_gigabyte_for_its_backward_pass(calls):
    assert calls["iteration"].saved <= 0.54e9


def test_rank_32_takes_a_ninth_of_the_file(calls):
    assert calls.bytes(keep_source=False, rank=32) <= 0.11 * calls.bytes(keep_source=False)
