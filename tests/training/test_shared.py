"""What trainings share: history, seeds, factors, what is kept where one ends early, checkpointing."""

import math

import pytest
import torch
from palimpsest.nodes import training
from palimpsest.nodes.host import checkpointing
from palimpsest.nodes.training.factors import LowRankWeight
from torch import nn


def test_a_history_counts_its_steps_and_leaves_out_what_is_no_number():
    history = training.History(before=5)
    for step in range(20):
        loss = math.nan if step in (0, 19) else float(step)
        history.note(step, [0.25, 0.75], torch.tensor([loss, loss + 1]))
    assert (history.steps, history.kept, len(history.losses)) == (25, 20, 20)
    assert history.points[2:4] == [(1, 0.25, 1.0), (1, 0.75, 2.0)]
    assert (history.early(), history.recent()) == (1.5, 18.5)
    assert history.finite
    assert not training.History(losses=[math.nan]).finite


def test_a_place_of_a_training_has_draws_of_its_own():
    def drawn(generator):
        return torch.rand(4, generator=generator).tolist()

    assert drawn(training.generator(3)) == drawn(training.generator(3 + (1 << 64))) != drawn(training.generator(4))
    places = [(0, "row", 1, 2), (0, "row", 2, 1), (1, "row", 1, 2), (0, "order", 1, 2)]
    assert len({tuple(drawn(training.generator_at(*place))) for place in places}) == len(places)
    assert drawn(training.generator_at(0, "row", 1, 2)) == drawn(training.generator_at(*places[0]))


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt])
def test_what_ends_early_is_kept_and_goes_on_its_way(end):
    kept = []
    with pytest.raises(end), training.kept_if_it_ends_early(lambda: kept.append(1)):
        raise end
    with training.kept_if_it_ends_early(lambda: kept.append(2)):
        pass
    assert kept == [1]


def test_factors_act_on_a_weight_after_they_were_brought_to_a_device():
    """The gradient reaches the factors that the optimiser knows, and the layer's own weight stays."""
    weight = torch.randn(3, 4, generator=training.generator(5))
    factors = training.Factors([("deep.block.to_q", 3, 4)], 2, 0, alpha=1.0)
    acting, before = LowRankWeight(factors, "deep.block.to_q"), weight.clone()
    factors.to("cpu")
    up, down = factors.pairs["deep.block.to_q"]
    x = torch.randn(5, 4, generator=training.generator(0))
    (x @ acting(weight).T).square().sum().backward()
    assert up.grad.abs().max() > 0
    with torch.no_grad():
        up.add_(up.grad)
        torch.testing.assert_close(acting(weight), before + 0.5 * up @ down)
    assert torch.equal(weight, before)


def test_changes_act_on_a_vector_and_hold_still_what_they_start_from():
    bias = torch.randn(3, generator=training.generator(5))
    changes, before = training.Changes({"deep.norm.bias": (3,)}), bias.clone()
    acting = training.ChangedWeight(changes, "deep.norm.bias")
    changes.to("cpu")
    assert torch.equal(acting(bias), before)
    (acting(bias) * torch.arange(3.0)).sum().backward()
    change = changes.tensors["deep.norm.bias"]
    assert change.grad.tolist() == [0, 1, 2]
    with torch.no_grad():
        change.sub_(change.grad)
    assert torch.equal(acting(bias.half()), (before.half().float() - torch.arange(3.0)).half())
    assert torch.equal(bias, before)
    assert changes.learned()["deep.norm.bias"].tolist() == [0, -1, -2]


def test_factors_of_a_convolution_are_convolutions_in_its_file():
    factors = training.Factors([("conv", 5, 3, 3, 3)], 2, 0)
    file = factors.file(lambda name: name, "up", "down")
    assert (file["conv.up.weight"].shape, file["conv.down.weight"].shape) == ((5, 2, 1, 1), (2, 3, 3, 3))


def test_factors_beside_any_network_are_those_of_its_file():
    network = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3))
    factors = training.Factors([("0", 4, 6), ("2", 3, 4)], 2, 0)
    with torch.no_grad():
        for tensor in factors.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=training.generator(1)))
    x = torch.randn(5, 6, generator=training.generator(2))
    before = network(x)
    with training.added_by(factors, network):
        found = network(x)
    file = factors.file(lambda name: name, "up", "down")
    assert torch.equal(network(x), before)
    with torch.no_grad():
        for name in ("0", "2"):
            network.get_submodule(name).weight += file[f"{name}.up.weight"] @ file[f"{name}.down.weight"]
            assert file[f"{name}.alpha"] == 2.0
    torch.testing.assert_close(found, network(x))
    with training.added_by(None, network):
        pass


def test_a_checkpointed_forward_has_the_same_gradient_and_keeps_less():
    layer, calls = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, kept = layer.__call__, checkpointing.checkpointed(layer)
    found = []
    for forward in (plain, kept):
        x = torch.ones(2, 4, requires_grad=True)
        forward(x).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)
    assert len(calls) == 3  # once, and twice
    with torch.no_grad():
        kept(torch.ones(2, 4))
    assert len(calls) == 4
