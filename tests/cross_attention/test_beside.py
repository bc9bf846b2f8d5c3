"""Cross-Attention Mask in the host: memory of a run, recorders, other nodes, precision, cost."""

import functools
import math

import comfy.model_management
import pytest
import tiny_models
import torch
from benchmarks import counting, counting_masks
from comfy.ldm.modules.attention import optimized_attention
from cross_attention.masked import (
    AFTER,
    RENORMALISED,
    TOKENS,
    WORDS,
    apply,
    by_matrix,
    close,
    differ,
    grid,
    half,
    prompts,
    sample,
    start,
    weigh_words,
    words_of,
)
from palimpsest.kernels.cross_attention_mask import masked as masked_attention
from palimpsest.nodes import host
from palimpsest.nodes.cross_attention import attention

pytestmark = pytest.mark.usefixtures("inference")


# ---- memory of a run


def test_masks_are_prepared_once_a_run_and_grid(model, monkeypatch):
    built = []
    build = attention.layer_mask
    monkeypatch.setattr(
        attention, "layer_mask", lambda regions, call, size: built.append(size) or build(regions, call, size)
    )
    patched = apply(model, half(), words_of(prompts()[0]))
    sample(patched, *prompts(), steps=4)
    assert len(built) == len({(size.height, size.width) for size in built}) == 2
    sample(patched, *prompts(), start(16, 16), steps=1)
    assert len(built) == 4


def test_a_node_of_ours_looks_at_the_source_by_its_own_prompt(model):
    """It needs no words in it; a sampler would be refused."""
    patched, visit = apply(model, half(), words_of(prompts()[0])), host.VisitLevels(start()[None])
    looked = {"sigmas": torch.tensor([1.0, 0.0]), "positive": tiny_models.prompt(5)}
    denoised = []
    for each in (patched, model):
        host.sample(each, visit, start(), **looked, callback=lambda step, found, *rest: denoised.append(found))
    assert torch.equal(*denoised)


def test_cancelling_leaves_nothing_behind(model, plain, monkeypatch):
    patched = apply(model, half(), words_of(prompts()[0]))
    masked, options, calls = sample(patched, *prompts()), set(patched.model_options["transformer_options"]), []

    def interrupt():
        calls.append(1)
        if len(calls) == 100:  # every layer of the network asks
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, *prompts())
    monkeypatch.undo()
    assert set(patched.model_options["transformer_options"]) == options
    assert torch.equal(sample(model, *prompts()), plain)
    assert torch.equal(sample(patched, *prompts()), masked)


# ---- recorders


@pytest.mark.parametrize("mode", [None, AFTER, RENORMALISED])
def test_a_recorder_reads_the_attention_by_other_values(model, mode):
    """The share of the words, of every place, from an indicator as value; the picture does not change."""
    both, seen = prompts(), {}
    ours = model.clone() if mode is None else apply(model, half(), words_of(both[0]), mode=mode)
    before = sample(ours, *both)

    def record(attend, query, key, options):
        indicator = torch.zeros_like(key)
        indicator[:, list(WORDS)] = 1
        if host.layer_key(options) not in seen:  # in the first layers of the first call nothing differs yet
            seen[host.layer_key(options)] = (query, key, options["n_heads"], attend(indicator)[..., 0])

    listening = ours.clone()
    layers = host.cross_attention_layers(model)
    attention.attach(listening, layers, recorders=(record,))
    assert torch.equal(sample(listening, *both), before)
    assert len(seen) == len(layers)
    query, key, heads, shares = seen[layers[0].key]
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2)[:, :1] for t in (query, key))
    weights = torch.ones(2, len(query), query.shape[1], key.shape[1])
    if mode is not None:
        options = {"activations_shape": (1, 1, 8, 8)}
        weights[0 if mode == RENORMALISED else 1][1, :, list(WORDS)] *= grid(half(), options)[0]  # [uncond, cond]
    wanted = masked_attention(q @ k.mT / math.sqrt(q.shape[-1]), weights[0][:, None], weights[1][:, None])
    torch.testing.assert_close(shares, wanted[:, 0, :, list(WORDS)].sum(-1), rtol=1e-4, atol=1e-5)


# ---- other nodes


def image_prompt(model):
    """As IP-Adapter does it: attention to other tokens, added to the plain one."""

    def attend(query, key, value, options):
        text = optimized_attention(query, key, value, options["n_heads"], transformer_options=options)
        tokens = torch.randn(1, 4, key.shape[-1], generator=torch.Generator().manual_seed(key.shape[-1]))
        tokens = tokens.expand(len(key), -1, -1)
        return text + 0.7 * optimized_attention(query, tokens, tokens, options["n_heads"], transformer_options=options)

    patched = model.clone()
    for layer in host.cross_attention_layers(model):
        patched.set_model_attn2_replace(attend, *layer.key)
    return patched


def test_an_image_prompt_that_was_there_before_is_added_to_the_masked_words(model):
    theirs, tokens = image_prompt(model), words_of(prompts()[0])
    weigh = weigh_words(half(), RENORMALISED)
    found = sample(apply(theirs, half(), tokens), *prompts())

    def attend(query, key, value, options):
        earlier = options_of(theirs)[host.layer_key(options)](query, key, value, options)
        plain = optimized_attention(query, key, value, options["n_heads"], transformer_options=options)
        return options_of(reference)[host.layer_key(options)](query, key, value, options) + earlier - plain

    def options_of(patched):
        return patched.model_options["transformer_options"]["patches_replace"]["attn2"]

    reference, wanted = by_matrix(model, weigh), model.clone()
    for layer in host.cross_attention_layers(model):
        wanted.set_model_attn2_replace(attend, *layer.key)
    close(found, sample(wanted, *prompts()))
    differ(found, sample(theirs, *prompts()))
    differ(found, sample(apply(model, half(), tokens), *prompts()))
    assert torch.equal(sample(apply(theirs, torch.ones(1, 8, 8), tokens), *prompts()), sample(theirs, *prompts()))


def test_tokens_that_another_node_adds_are_not_the_words(model):
    both, extra = prompts(), tiny_models.prompt(9, 3)[0][0]

    def lengthen(n, context, value, options):
        longer = torch.cat([context, extra.expand(len(context), -1, -1)], 1)
        return n, longer, longer

    theirs = model.clone()
    theirs.set_model_attn2_patch(lengthen)
    found = sample(apply(theirs, half(), words_of(both[0])), *both)
    close(found, sample(by_matrix(theirs, weigh_words(half(), RENORMALISED)), *both))
    found = sample(apply(theirs, half()), *both)
    close(found, sample(by_matrix(theirs, weigh_words(half(), AFTER, range(TOKENS + 3))), *both))


def patched_text(model, change):
    patched = model.clone()
    patched.set_model_attn2_patch(change)
    return patched


def test_a_node_that_takes_tokens_or_places_away_is_refused(model):
    tokens = words_of(prompts()[0])
    shorter = patched_text(model, lambda n, context, value, options: (n, context[:, :3], context[:, :3]))
    with pytest.raises(ValueError, match="another node shortens the text"):
        sample(apply(shorter, half(), tokens), *prompts())
    fewer = patched_text(model, lambda n, context, value, options: (n[:, ::2], context, context))
    with pytest.raises(ValueError, match="another node merges or tiles"):
        sample(apply(fewer, half(), tokens), *prompts())


def test_an_attention_override_acts_under_the_mask_too(model):
    seen = []

    def override(function, *args, **kwargs):
        seen.append(kwargs.get("mask") is not None)
        return 1.1 * function(*args, **kwargs)

    theirs = model.clone()
    theirs.model_options["transformer_options"]["optimized_attention_override"] = override
    differ(sample(apply(theirs, half(), words_of(prompts()[0])), *prompts()), sample(theirs, *prompts()))
    assert any(seen) and not all(seen)


HOST_NODES = {
    "FreeU_V2": ("nodes_freelunch", {}),
    "TomePatchModel": ("nodes_tomesd", {"ratio": 0.5}),
    "HyperTile": ("nodes_hypertile", {"tile_size": 32, "swap_size": 2, "max_depth": 0}),
    "PerturbedAttentionGuidance": ("nodes_pag", {}),
    "SelfAttentionGuidance": ("nodes_sag", {}),
    "PatchModelAddDownscale": ("nodes_model_downscale", {"block_number": 1, "end_percent": 1.0}),
    "UNetCrossAttentionMultiply": ("nodes_attention_multiply", {"q": 1.5, "k": 1.2}),
}


@pytest.mark.parametrize("name", HOST_NODES)
def test_beside_nodes_of_the_host_in_any_order(model, name):
    module, settings = HOST_NODES[name]
    node, tokens = getattr(pytest.importorskip(f"comfy_extras.{module}"), name), words_of(prompts()[0])

    def theirs(model):
        return tiny_models.execute(node, model=model, **settings)[0]

    def run(model):
        torch.manual_seed(0)  # two of them draw lots
        return sample(model, *prompts())

    alone = run(theirs(model))
    first, last = run(theirs(apply(model, half(), tokens))), run(apply(theirs(model), half(), tokens))
    close(first, last)
    differ(first, alone)
    torch.testing.assert_close(run(apply(theirs(model), torch.ones(1, 8, 8), tokens)), alone, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun", "dpmpp_2m", "uni_pc"])
def test_samplers(model, sampler):
    found = sample(apply(model, half(), words_of(prompts()[0])), *prompts(), sampler=sampler)
    differ(found, sample(model, *prompts(), sampler=sampler))


@pytest.mark.parametrize("mode", [AFTER, RENORMALISED])
def test_attention_in_float32_where_the_host_wants_it(mode):
    """As SD 2.x does; the rest of the model stays in half precision."""
    model, seen = tiny_models.unet(dtype=torch.float16), set()
    for part in host.transformer_parts(model.model.diffusion_model).values():
        part.attn_precision = part.attn2.attn_precision = torch.float32

    def override(function, query, *args, **kwargs):
        if kwargs.get("mask") is not None:
            seen.add(query.dtype)
        return function(query, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    found = sample(apply(model, half(), words_of(prompts()[0]), mode=mode), *prompts())
    wanted = sample(apply(tiny_models.unet(), half(), words_of(prompts()[0]), mode=mode), *prompts())
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
    assert seen == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = tiny_models.unet(dtype=dtype)
    found = sample(apply(model, half(), words_of(prompts()[0]), mode=AFTER), *prompts())
    wanted = sample(apply(tiny_models.unet(), half(), words_of(prompts()[0]), mode=AFTER), *prompts())
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


# ---- cost, counted at full size


@functools.cache
def at_full_size(name):
    """(model, what its plain step costs)."""
    model = counting.build(counting.FAMILIES[name])
    return model, counting_masks.later_step(model, counting.FAMILIES[name])


@pytest.mark.parametrize("regions", counting_masks.MASKED)
@pytest.mark.parametrize("name", counting.FAMILIES)
def test_eight_regions_in_all_layers_cost_half_a_percent_at_most(name, regions):
    family, (model, plain) = counting.FAMILIES[name], at_full_size(name)
    found = counting_masks.later_step(counting_masks.masked(model, family, regions), family)
    assert max(found.h200 / plain.h200, found.rtx4090 / plain.rtx4090) <= 1.005
    assert found.ops - plain.ops <= 2 * len(host.cross_attention_layers(model))
    assert found.waits == plain.waits == 0
