"""The layers' part of Apply KV against its equations, and what is read back of a tuned step."""

import math

import pytest
import torch
from palimpsest.kernels.kv_inversion import attention
from palimpsest.nodes import host
from palimpsest.nodes.host.call import NAME as CALL
from palimpsest.nodes.kv import modes, sampling
from palimpsest.nodes.kv.embeddings import LEARNED, SCALARS, SOURCE, KVEmbeddings, LayerEmbeddings, TunedLayer, pack
from palimpsest.nodes.kv.modes import MODES
from palimpsest.nodes.kv.psi import Psi

pytestmark = pytest.mark.usefixtures("inference")


LAYER = TunedLayer("output", 3, 0, 4, 6, 16)


def embeddings(pictures):
    """Random ones of a layer."""
    scalars = dict(zip(SCALARS, torch.rand(4, pictures, 1, 1), strict=True))
    names = ("k_hat", "v_hat", "k_source", "v_source")
    return LayerEmbeddings(**dict(zip(names, torch.randn(4, pictures, 24, 16), strict=True)), **scalars)


def options(rows, chunks, steps):
    """What the host hands an attention replacement in a model call, for which `steps` of sources are known."""
    call = host.ModelCall(
        sigmas=torch.ones(rows),
        prompts=(None,) * chunks,
        areas=(None,) * chunks,
        pictures=rows // chunks,
        latent=(8, 12),
        text_length=7,
        model=None,
        run=host.Run(),
        things=steps,
    )
    return {
        "cond_or_uncond": list(range(chunks))[::-1], "n_heads": 2, "dim_head": 8, "attn_precision": None,
        "activations_shape": [rows, 16, 4, 6], CALL: call, "block": LAYER.key[:2], "block_index": LAYER.index,
    }  # fmt: skip


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("shared", [True, False], ids=["one picture for all", "one for each"])
def test_the_adapter_is_equation_1_and_2(mode, strength, shared):
    q, k, v = torch.randn(3, 4, 24, 16)
    pictures = 1 if shared else 2
    learned = embeddings(pictures)
    out = attend(mode, learned, strength)(q, k, v)
    rows = {name: t.repeat(4 // pictures, 1, 1) for name, t in vars(learned).items() if t is not None}
    if mode == "recompute":
        k_bar = rows["lambda_k"] * k + rows["gamma_k"] * rows["k_hat"]
        v_bar = rows["lambda_v"] * v + rows["gamma_v"] * rows["v_hat"]
    elif mode == "frozen":
        k_bar = rows["lambda_k"] * rows["k_source"] + rows["gamma_k"] * rows["k_hat"]
        v_bar = rows["lambda_v"] * rows["v_source"] + rows["gamma_v"] * rows["v_hat"]
    else:
        k_bar, v_bar = rows["k_source"], rows["v_source"]
    if mode == "extend":
        wanted = weighted(q, torch.cat([k, k_bar], 1), torch.cat([v, v_bar], 1), [1.0] * 24 + [strength] * 24)
    else:
        wanted = attention(q, torch.lerp(k, k_bar, strength), torch.lerp(v, v_bar, strength), 2)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def attend(mode, learned, strength=1.0, mask=None, source_mask=None):
    """A layer's attention with one source, as the host calls it."""
    window, mode = host.Window(math.inf, 0.0, always=True), MODES[mode]
    source = sampling.Source(kv=None, layers={LAYER.key: LAYER}, mode=mode, window=window, strength=strength, mask=mask)
    step = sampling.CurrentStep({LAYER.key: mode.shown(learned, source_mask)})
    attention = sampling.SourceAttention((source,))
    return lambda q, k, v: attention(q, k, v, options(len(q), 2, {source: step}))


def weighted(q, k, v, weights):
    """Attention in which key j counts weights[j] times."""
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.mT / 8**0.5).exp() * torch.as_tensor(weights)
    return ((scores / scores.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("different", [False, True], ids=["one mask", "a mask for each"])
def test_a_source_mask_restricts_the_keys(different):
    q, k, v = torch.randn(3, 4, 24, 16)
    learned = embeddings(2)
    seen = (torch.rand(2, 24) > 0.5).float()
    seen = seen if different else seen[:1]
    rows = {name: t.repeat(2, 1, 1) for name, t in vars(learned).items() if t is not None}
    found = attend("extend", learned, source_mask=seen)(q, k, v)
    keys, values = torch.cat([k, rows["k_source"]], 1), torch.cat([v, rows["v_source"]], 1)
    for row in range(4):
        weights = torch.cat([torch.ones(24), seen[row % len(seen)]])
        wanted = weighted(q[row : row + 1], keys[row : row + 1], values[row : row + 1], weights)
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-5)
    m = seen.expand(2, -1).repeat(2, 1)[..., None]
    k_bar = k + m * (rows["lambda_k"] * k + rows["gamma_k"] * rows["k_hat"] - k)
    v_bar = v + m * (rows["lambda_v"] * v + rows["gamma_v"] * rows["v_hat"] - v)
    found = attend("recompute", learned, source_mask=seen)(q, k, v)
    torch.testing.assert_close(found, attention(q, k_bar, v_bar, 2), rtol=1e-4, atol=1e-5)


def test_a_mask_with_no_white_token_leaves_the_whitest():
    shown = modes.visible(torch.arange(3.0)[None, :, None], torch.zeros(1, 3, 1), torch.tensor([[0.1, 0.3, 0.2]]))
    assert shown.key.flatten().tolist() == [1.0]


def test_a_prompts_area_takes_its_part_of_the_learned_tokens():
    area = host.Area(2, 4, 1, 2, (4, 6))
    assert area.tokens((LAYER.height, LAYER.width), 2, 4).tolist() == [8, 9, 10, 11, 14, 15, 16, 17]
    assert area.tokens((2, 3), 1, 2).tolist() == [1, 2]  # 1 / 4 of 2 rows rounds down to row 0
    assert area.crop(torch.arange(96.0).view(1, 8, 12))[0, 0].tolist() == [28.0, 29, 30, 31, 32, 33, 34, 35]


def test_rows_that_other_nodes_add_are_refused():
    with pytest.raises(ValueError, match="5 rows for 2 prompts"):
        host.chunk_rows({"cond_or_uncond": [1, 0]}, 5)


def test_the_nearest_level_is_nearest_by_ratio():
    assert [host.nearest_level((14.6, 1.0, 0.03), s) for s in (900.0, 3.0, 5.0, 0.5, 0.1, 0.0)] == [0, 1, 0, 1, 2, 2]


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_step_is_read_back_as_it_was_written(rank):
    layers = [LAYER, TunedLayer("middle", 0, 1, 2, 3, 8)]
    psi = Psi(layers, 2, torch.device("cpu"), rank)
    for t in psi.tensors():
        t.copy_(torch.randn_like(t))
    sources = {layer.key: torch.randn(2, layer.tokens, layer.channels) for layer in layers}
    kv = KVEmbeddings(
        (1.0, 0.0), tuple(layers), (0, 1), (pack(psi.factors.values()),),
        (pack([(t,)] for t in sources.values()),),
        torch.stack([s[..., 0, 0].T for s in psi.scalars.values()])[None], torch.zeros(2, 4, 4, 6), "x", rank,
    )  # fmt: skip
    read = kv.step(0, kv.pieces(0, [LEARNED, SOURCE]), torch.device("cpu"), torch.float32)
    for layer in layers:
        found = read[layer.key]
        for hat, written in zip((found.k_hat, found.v_hat), psi.embeddings(layer.key), strict=True):
            torch.testing.assert_close(hat, written, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found.source, sources[layer.key], rtol=1e-3, atol=1e-3)
        weights = torch.stack([found.lambda_k, found.gamma_k, found.lambda_v, found.gamma_v], 1)
        torch.testing.assert_close(weights, psi.weights(layer.key))
    assert LAYER.factored(rank) == (rank in (2, 5))
    assert layers[1].factored(rank) == (rank == 2)


def test_steps_between_keyframes_lie_between_them():
    pieces = [None, torch.zeros(1, 2 * 24 * 16).half(), None, None, torch.ones(1, 2 * 24 * 16).half()]
    scalars = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 4, 1)
    kv = KVEmbeddings(
        (5.0, 4, 3, 2, 1, 0), (LAYER,), (1, 5), tuple(pieces), (None,) * 5, scalars, torch.zeros(1, 4, 4, 6), "x"
    )
    assert [kv.keyframes(i) for i in range(5)] == [None, (1, 1, 0.0), (1, 4, 1 / 3), (1, 4, 2 / 3), (4, 4, 0.0)]
    assert kv.step(0, kv.pieces(0, [LEARNED]), torch.device("cpu"), torch.float32) is None
    layer = kv.step(3, kv.pieces(3, [LEARNED, SOURCE]), torch.device("cpu"), torch.float32)[LAYER.key]
    torch.testing.assert_close(layer.k_hat, torch.full((1, 24, 16), 2 / 3))
    torch.testing.assert_close(layer.lambda_k, torch.full((1, 1, 1), 3.0))
    assert layer.source is None
