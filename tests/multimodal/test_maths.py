"""The connector's maths: bidirectional, padding without influence, the equations written out."""

import pytest
import torch
from palimpsest.kernels.connector import (
    ConnectorConfig,
    ConnectorNetwork,
    attend,
    initialise,
    mean_token,
    repeated,
    weighted,
)
from torch import nn

SMALL = {"hidden_width": 10, "context_width": 12, "depth": 2, "heads": 3}


def network(seed=0, dtype=torch.float64, **changes):
    made = ConnectorNetwork(ConnectorConfig(**SMALL | changes), nn, dtype)
    initialise(made, seed)
    return made


def hidden(rows=2, tokens=7, seed=1):
    return torch.randn(rows, tokens, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_its_blocks_are_the_equations():
    """Linear, then x + A(LN x), x + MLP(LN x) twice, then LN; written out head by head."""
    net, states = network(), hidden()
    x = states @ net.project.weight.T + net.project.bias
    for block in net.blocks:
        n = torch.nn.functional.layer_norm(x, (12,))
        q, k, v = (n @ layer.weight.T + layer.bias for layer in (block.query, block.key, block.value))
        heads = []
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            scores = q[..., part] @ k[..., part].mT / 2.0
            heads.append(scores.softmax(-1) @ v[..., part])
        x = x + torch.cat(heads, -1) @ block.out.weight.T + block.out.bias
        inner = torch.nn.functional.gelu(
            torch.nn.functional.layer_norm(x, (12,)) @ block.widen.weight.T + block.widen.bias
        )
        x = x + inner @ block.narrow.weight.T + block.narrow.bias
    context, pooled = net(states)
    torch.testing.assert_close(context, torch.nn.functional.layer_norm(x, (12,)))
    assert pooled is None


def test_every_token_looks_at_every_other():
    states = hidden(1).requires_grad_(True)
    context, _ = network()(states)
    for token in range(7):
        (gradient,) = torch.autograd.grad(context[0, token].sin().sum(), states, retain_graph=True)
        assert (gradient[0].norm(dim=-1) > 1e-9).all()


def test_padding_has_no_influence_and_comes_out_as_zeros():
    net, short, length = network(pooled_width=5), hidden(1, 4), 7
    nn.init.normal_(net.pooled.weight)
    mask = torch.arange(length)[None] < 4
    alone, pooled = net(short)
    for filling in (0.0, 1e3):
        padded = torch.cat([short, torch.full((1, length - 4, 10), filling, dtype=torch.float64)], 1)
        context, pooled_too = net(padded, mask)
        torch.testing.assert_close(context[:, :4], alone)
        torch.testing.assert_close(pooled_too, pooled)
        assert torch.count_nonzero(context[:, 4:]) == 0


def test_a_batch_is_its_prompts_one_by_one():
    net, states = network(), hidden(3)
    together = net(states)[0]
    for i in range(3):
        torch.testing.assert_close(together[i], net(states[i : i + 1])[0][0])


def test_the_mean_leaves_padding_out():
    tokens = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert mean_token(tokens, torch.tensor([[True, True, False]])).item() == 2.0
    assert mean_token(tokens[:, :2]).item() == 2.0


def test_attention_over_a_mask_is_attention_over_what_is_left():
    q, k, v = torch.randn(3, 1, 5, 12, dtype=torch.float64).unbind(0)
    mask = torch.tensor([[True, False, True, True, False]])
    left = attend(q, k[:, mask[0]], v[:, mask[0]], 3)
    torch.testing.assert_close(attend(q, k, v, 3, mask), left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close(dtype):
    wanted = network(dtype=torch.float32)(hidden().float())[0]
    found = network(dtype=dtype)(hidden().to(dtype))[0]
    assert found.dtype is dtype
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


def test_the_same_seed_gives_the_same_weights_and_an_untrained_pooled_output_is_zero():
    one, same, other = network(3, pooled_width=5), network(3, pooled_width=5), network(4, pooled_width=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.project.weight, other.project.weight)
    assert torch.count_nonzero(one(hidden())[1]) == 0


def test_the_papers_size_for_sdxl_is_800_million():
    config = ConnectorConfig(4096, 2048)
    with torch.device("meta"):
        made = ConnectorNetwork(config, nn)
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(0.814e9, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depth": 0}, "depth must be from 1"),
        ({"heads": 5}, "divide by its 5 heads"),
        ({"pooled_width": -1}, "pooled_width must be"),
        ({"hidden_width": 10**9}, "hidden_width must be"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        ConnectorConfig(**SMALL | changes)


# ---- weights of pictures, repeated prompts


def test_a_weight_moves_a_token_from_neutral_and_1_keeps_its_bits():
    context, neutral = torch.randn(1, 4, 3), torch.randn(1, 1, 3)
    moved = weighted(context, neutral, torch.tensor([1.0, 0.0, 2.0, 1.0]))
    assert torch.equal(moved[:, [0, 3]], context[:, [0, 3]])
    torch.testing.assert_close(moved[:, 1], neutral[:, 0])
    torch.testing.assert_close(moved[:, 2], 2 * context[:, 2] - neutral[:, 0])


def test_whole_repetitions_leave_attention_as_it_is():
    query, tokens = torch.randn(1, 6, 12, dtype=torch.float64), torch.randn(1, 5, 12, dtype=torch.float64)
    wanted = attend(query, tokens, tokens, 3)
    many = repeated(tokens, 20)
    torch.testing.assert_close(attend(query, many, many, 3), wanted)
    cut = repeated(tokens, 18)
    assert cut.shape[1] == 18
    assert (attend(query, cut, cut, 3) - wanted).norm() > 1e-3
    kept = torch.arange(18)[None] < 15
    torch.testing.assert_close(attend(query, cut, cut, 3, kept), wanted)
