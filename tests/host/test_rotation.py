"""The gradient of queries and keys that the host norms and rotates by one operation."""

import comfy.ops
import pytest
import torch
from comfy.ldm.cosmos import predict2
from palimpsest.nodes.host import rotation

HEADS, CHANNELS, TOKENS = 2, 8, 5

pytestmark = pytest.mark.skipif(
    not hasattr(predict2.Attention, rotation.METHOD), reason="this host's attention has another form"
)


def rope(generator):
    """As the host's: a 2 x 2 matrix for every place and pair of channels."""
    return torch.randn(1, TOKENS, 1, CHANNELS // 2, 2, 2, generator=generator, dtype=torch.float64)


def test_a_pair_is_one_channel_of_either_half_and_turns_by_its_places_matrix():
    generator = torch.Generator().manual_seed(0)
    turns, given = rope(generator), torch.randn(3, TOKENS, HEADS, CHANNELS, generator=generator, dtype=torch.float64)
    found = rotation.rotated(given, turns)
    for place in range(TOKENS):
        for pair in range(CHANNELS // 2):
            both = [pair, pair + CHANNELS // 2]
            wanted = given[:, place, :, both] @ turns[0, place, 0, pair].T
            torch.testing.assert_close(found[:, place, :, both], wanted)


def test_values_are_the_hosts_to_the_bit_and_the_gradient_is_their_slope():
    generator = torch.Generator().manual_seed(1)
    attention = predict2.Attention(
        16, None, HEADS, CHANNELS, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    ).requires_grad_(False)
    for parameter in attention.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    compute = rotation.RotatedWithGradient(attention.compute_qkv)
    x = torch.randn(1, TOKENS, 16, generator=generator)
    way, turns = torch.randn(x.shape, generator=generator), rope(generator).float()
    weights = [torch.randn(1, TOKENS, HEADS, CHANNELS, generator=generator) for _ in range(3)]

    def total(given):
        return sum((tensor * weight).double().sum() for tensor, weight in zip(given, weights, strict=True))

    own = [attention.compute_qkv(x + step * way, rope_emb=turns) for step in (0.0, -1e-2, 1e-2)]
    with torch.no_grad():
        assert all(map(torch.equal, compute(x, rope_emb=turns), own[0]))
    leaf = x.clone().requires_grad_(True)
    found = compute(leaf, rope_emb=turns)
    assert all(map(torch.equal, found, own[0]))
    total(found).backward()
    assert float((leaf.grad * way).sum()) == pytest.approx(float(total(own[2]) - total(own[1])) / 2e-2, rel=1e-3)
