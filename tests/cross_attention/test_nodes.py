"""Cross-Attention Mask in the host: identity, rows, places, other nodes, refusals, cost."""

import math

import comfy.model_management
import comfy.samplers
import pytest
import tiny_models
import torch
from benchmarks import counting, counting_masks
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from palimpsest.kernels.cross_attention_mask import masked as masked_attention
from palimpsest.nodes.cross_attention import masking as cross_attention
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.host import model as host
from palimpsest.nodes.words.words import ChosenWords

import nodes

STEPS, GUIDANCE, TOKENS = 2, 3.0, 7
WORDS = (2, 3)
AFTER, RENORMALISED, PFB = cross_attention.MODES
POSITIVE, NEGATIVE = 0, 1


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def words_of(prompt, *positions):
    """The TOKENS of one word with some positions in a prompt."""
    return ChosenWords(("word",), (positions or WORDS,), prompt[0][0])


def prompts(family="sd15", lengths=(TOKENS, TOKENS)):
    return tuple(tiny_models.prompt(seed, length, family) for seed, length in zip((1, 2), lengths, strict=True))


def half(height=64, width=64):
    """A MASK that is white on the left, with a soft border in between."""
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    mask[..., width // 2 : width // 2 + 8] = 0.3
    return mask


def apply(model, mask, tokens=None, **settings):
    inputs = {"mode": RENORMALISED if tokens is not None else AFTER, "mask_uncond": False} | settings
    return tiny_models.execute(CrossAttentionMask, model=model, mask=mask, tokens=tokens, **inputs)[0]


def start(height=8, width=8, pictures=1, seed=3):
    return torch.randn(pictures, 4, height, width, generator=torch.Generator().manual_seed(seed))


def sample(model, positive, negative, latent=None, *, steps=STEPS, sampler="euler", cfg=GUIDANCE):
    sampling = comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler, "normal")
    noise = start() if latent is None else latent
    settings = {"cfg": cfg, "latent_image": torch.zeros_like(noise), "disable_pbar": True, "seed": 1}
    return sampling.sample(noise, positive, negative, **settings)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def differ(found, other):
    assert torch.isfinite(found).all()
    assert (found - other).norm() > 1e-4 * other.norm()


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return tiny_models.unet()


@pytest.fixture(scope="module")
def plain(model):
    with torch.inference_mode():
        return sample(model, *prompts())


# ---- the same with the matrix written out, rows told apart by the test itself


def grid(mask, options):
    """A mask's mean over each place of a layer (pictures, N, 1)."""
    size = tuple(options["activations_shape"][-2:])
    return torch.nn.functional.adaptive_avg_pool2d(mask[:, None], size).flatten(2).mT


def by_matrix(model, weigh, layers=None):
    """A clone with materialised attention: weigh(which prompt, options, before, after) changes weights in place."""

    def attend(query, key, value, options):
        heads, chunks = options["n_heads"], options["cond_or_uncond"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        before = torch.ones(len(query), query.shape[1], key.shape[1])
        after = torch.ones_like(before)
        for which, *weights in zip(chunks, before.chunk(len(chunks)), after.chunk(len(chunks)), strict=True):
            weigh(which, options, *weights)
        weights = masked_attention(q @ k.mT / math.sqrt(q.shape[-1]), before[:, None], after[:, None])
        return (weights @ v).transpose(1, 2).flatten(2)

    patched = model.clone()
    for layer in layers or host.cross_attention_layers(model):
        patched.set_model_attn2_replace(attend, *layer.key)
    return patched


def weigh_words(mask, mode, positions=WORDS, which=(POSITIVE,)):
    """What `by_matrix` does for words at some positions in the rows of some prompts."""

    def weigh(chunk, options, before, after):
        if chunk in which:
            weight = grid(mask, options)
            weight = (weight >= 0.5).float() if mode == PFB else weight
            (after if mode == AFTER else before)[..., list(positions)] *= weight

    return weigh


# ---- what it does


@pytest.mark.parametrize("mask_uncond", [False, True])
@pytest.mark.parametrize("mode", [AFTER, RENORMALISED, PFB])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_words_act_as_the_written_out_matrix_has_it(family, mode, mask_uncond):
    model, both = tiny_models.unet(family), prompts(family)
    ours = apply(model, half(), words_of(both[0]), mode=mode, mask_uncond=mask_uncond)
    which = (POSITIVE, NEGATIVE) if mask_uncond else (POSITIVE,)
    found = sample(ours, *both)
    close(found, sample(by_matrix(model, weigh_words(half(), mode, which=which)), *both))
    differ(found, sample(model, *both))


@pytest.mark.parametrize("mask_uncond", [False, True])
def test_without_tokens_every_token_is_masked_as_in_the_paper(model, plain, mask_uncond):
    which = (POSITIVE, NEGATIVE) if mask_uncond else (POSITIVE,)
    found = sample(apply(model, half(), mask_uncond=mask_uncond), *prompts())
    close(found, sample(by_matrix(model, weigh_words(half(), AFTER, range(TOKENS), which)), *prompts()))
    differ(found, plain)


def test_outside_is_inside_of_the_inverted_mask(model):
    tokens = words_of(prompts()[0])
    for mode in (AFTER, RENORMALISED):
        outside = sample(apply(model, half(), tokens, side="outside", mode=mode), *prompts())
        close(outside, sample(apply(model, 1 - half(), tokens, mode=mode), *prompts()))


def test_a_black_mask_takes_the_words_away_everywhere(model, plain):
    tokens, black = words_of(prompts()[0]), torch.zeros(1, 64, 64)
    found = sample(apply(model, black, tokens), *prompts())
    without = [[torch.cat([prompts()[0][0][0][:, :2], prompts()[0][0][0][:, 4:]], 1), {}]]
    close(found, sample(model, without, prompts()[1]))
    assert torch.equal(sample(apply(model, black, tokens, side="outside"), *prompts()), plain)


def test_half_a_strength_leaves_half_the_weight(model):
    tokens = words_of(prompts()[0])
    found = sample(apply(model, half(), tokens, strength=0.5, mode=AFTER), *prompts())
    close(found, sample(by_matrix(model, weigh_words(0.5 + 0.5 * half(), AFTER)), *prompts()))


@pytest.mark.parametrize("mode", [AFTER, RENORMALISED])
def test_feather_is_a_softer_mask(model, mode):
    tokens, sharp = words_of(prompts()[0]), half().round()
    soft = sample(apply(model, sharp, tokens, feather=16.0, mode=mode), *prompts())
    differ(soft, sample(apply(model, sharp, tokens, mode=mode), *prompts()))


@pytest.mark.parametrize(
    "settings",
    [
        {"mask": torch.ones(1, 64, 64)},
        {"mask": torch.ones(1, 50, 31), "feather": 9.0},
        {"mask": torch.zeros(1, 64, 64), "side": "outside"},
        {"mask": half(), "strength": 0.0},
        {"mask": half(), "start_percent": 1.0},
    ],
    ids=["white", "white, feathered", "black, outside", "strength 0", "after the end"],
)
@pytest.mark.parametrize("mode", [AFTER, RENORMALISED, PFB, None])
def test_where_nothing_is_masked_the_picture_is_the_models_bit_for_bit(model, plain, mode, settings):
    both = prompts()
    tokens, settings = (None, settings) if mode is None else (words_of(both[0]), settings | {"mode": mode})
    assert torch.equal(sample(apply(model, tokens=tokens, mask_uncond=True, **settings), *both), plain)


def test_the_model_stays_as_it_was(model, plain):
    options = str(model.model_options)
    patched = apply(model, half(), words_of(prompts()[0]))
    ours = set(patched.model_options["transformer_options"])
    sample(patched, *prompts())
    assert str(model.model_options) == options
    assert set(patched.model_options["transformer_options"]) == ours
    assert torch.equal(sample(model, *prompts()), plain)


# ---- when and in which layers


def test_it_acts_between_its_percents_only(model):
    tokens, sigmas = words_of(prompts()[0]), []
    sampling = model.get_model_object("model_sampling")
    ours = apply(model, half(), tokens, start_percent=0.3, end_percent=0.8)
    first, last = sampling.percent_to_sigma(0.3), sampling.percent_to_sigma(0.8)

    def weigh(which, options, before, after):
        sigma = float(options["sigmas"][0])
        sigmas.append(sigma)
        if last < sigma <= first:
            weigh_words(half(), RENORMALISED)(which, options, before, after)

    close(sample(ours, *prompts(), steps=6), sample(by_matrix(model, weigh), *prompts(), steps=6))
    assert max(sigmas) > first and min(sigmas) <= last


@pytest.mark.parametrize("layers", ["1/1 of the latent", "1/2 of the latent", "PFB-Diff background", "custom"])
def test_it_acts_in_the_chosen_layers_only(model, layers):
    chosen = cross_attention.choose_layers(model, layers, "middle, output 0")
    assert 0 < len(chosen) < len(host.cross_attention_layers(model))
    ours = apply(model, half(), words_of(prompts()[0]), layers=layers, custom_layers="middle, output 0")
    close(sample(ours, *prompts()), sample(by_matrix(model, weigh_words(half(), RENORMALISED), chosen), *prompts()))


SD15_PRESETS = {
    "PFB-Diff object": "input 7-8, middle, output 3-7",
    "PFB-Diff background": "input 4-8, middle, output 3-8",
    "1/1 of the latent": "input 1-2, output 9-11",
    "1/2 of the latent": "input 4-5, output 6-8",
    "1/4 of the latent": "input 7-8, output 3-5",
    "1/8 of the latent": "middle",
    "all": "input, middle, output",
}
SDXL_PRESETS = {
    "PFB-Diff object": "middle, output 0-1",
    "PFB-Diff background": "input 7-8, middle, output 0-2",
    "1/2 of the latent": "input 4-5, output 3-5",
    "1/4 of the latent": "input 7-8, middle, output 0-2",
    "all": "input, middle, output",
}


@pytest.mark.parametrize(
    ("family", "preset", "custom"),
    [
        *(("sd15-full", *pair) for pair in SD15_PRESETS.items()),
        *(("sdxl-full", *pair) for pair in SDXL_PRESETS.items()),
    ],
)
def test_presets_on_the_published_networks(family, preset, custom):
    model = tiny_models.unet_without_weights(family)
    chosen = cross_attention.choose_layers(model, preset)
    assert chosen == cross_attention.choose_layers(model, "custom", custom)
    assert chosen


def test_one_of_several_layers_in_a_block():
    model = tiny_models.unet_without_weights("sdxl-full")
    chosen = cross_attention.choose_layers(model, "custom", "Output 0.3,middle.9 , input 4 - 5.1")
    assert [str(layer) for layer in chosen] == ["input 4.1", "input 5.1", "middle 0.9", "output 0.3"]


@pytest.mark.parametrize("custom", ["input 3", "output 12-14", "bottleneck", "middle.1", "input 7-"])
def test_a_custom_layer_that_is_not_there_is_answered_with_what_is(custom):
    model = tiny_models.unet_without_weights("sd15-full")
    with pytest.raises(ValueError, match="input 1, 2, 4, 5, 7, 8; middle; output 3, 4, 5, 6, 7, 8, 9, 10, 11"):
        cross_attention.choose_layers(model, "custom", f"middle, {custom}")


def test_no_layer_at_all_is_refused():
    model = tiny_models.unet_without_weights("sdxl-full")
    with pytest.raises(ValueError, match="custom_layers is empty"):
        cross_attention.choose_layers(model, "custom", " , ")
    with pytest.raises(ValueError, match="1/2, 1/4 of the latent, not in layers '1/8 of the latent'"):
        cross_attention.choose_layers(model, "1/8 of the latent")


# ---- rows


@pytest.mark.parametrize("mask_uncond", [False, True])
@pytest.mark.parametrize("lengths", [(TOKENS, 40), (40, TOKENS)])
def test_prompts_that_run_in_calls_of_their_own(model, lengths, mask_uncond):
    both = prompts(lengths=lengths)
    which = (POSITIVE, NEGATIVE) if mask_uncond else (POSITIVE,)
    found = sample(apply(model, half(), words_of(both[0]), mask_uncond=mask_uncond), *both)
    close(found, sample(by_matrix(model, weigh_words(half(), RENORMALISED, which=which)), *both))


@pytest.mark.parametrize("mode", [AFTER, RENORMALISED])
@pytest.mark.parametrize("lengths", [(7, 14), (14, 7), (14, 21), (7, 28)])
def test_every_copy_of_a_prompt_that_the_host_repeats_is_masked(model, mode, lengths):
    both, joined = prompts(lengths=lengths), math.lcm(*lengths)
    calls = []

    def weigh(which, options, before, after):
        calls.append(len(options["cond_or_uncond"]))
        assert before.shape[-1] == joined
        if which == POSITIVE:
            places = [copy + place for copy in range(0, joined, lengths[0]) for place in WORDS]
            weigh_words(half(), mode, places)(which, options, before, after)

    close(sample(apply(model, half(), words_of(both[0]), mode=mode), *both), sample(by_matrix(model, weigh), *both))
    assert set(calls) == {2}


def test_positions_behind_a_shorter_negative_prompts_end_are_nothing_there(model):
    both = prompts(lengths=(14, 7))
    found = sample(apply(model, half(), words_of(both[0], 5, 9), mask_uncond=True), *both)

    def weigh(which, options, before, after):
        places = (5, 9) if which == POSITIVE else (5, 12)
        weigh_words(half(), RENORMALISED, places, (which,))(which, options, before, after)

    close(found, sample(by_matrix(model, weigh), *both))


def test_words_are_found_behind_another_prompt(model):
    (first, negative), second = prompts(), tiny_models.prompt(5)
    joined = tiny_models.execute(nodes.ConditioningConcat, conditioning_to=first, conditioning_from=second)[0]
    found = sample(apply(model, half(), words_of(second)), joined, negative)
    weigh = weigh_words(half(), RENORMALISED, [TOKENS + place for place in WORDS])
    close(found, sample(by_matrix(model, weigh), joined, negative))


def test_a_prompt_that_was_concatenated_with_itself_is_masked_twice(model):
    first, negative = prompts()
    twice = tiny_models.execute(nodes.ConditioningConcat, conditioning_to=first, conditioning_from=first)[0]
    found = sample(apply(model, half(), words_of(first)), twice, negative)
    places = [*WORDS, *(TOKENS + place for place in WORDS)]
    close(found, sample(by_matrix(model, weigh_words(half(), RENORMALISED, places)), twice, negative))


def test_only_the_prompt_with_the_words_is_masked_among_several(model):
    (first, negative), second = prompts(), tiny_models.prompt(5, tokens=40)  # which runs in a call of its own
    both = first + second
    found = sample(apply(model, half(), words_of(first), mask_uncond=True), both, negative)

    def weigh(which, options, before, after):
        if before.shape[-1] == TOKENS:
            weigh_words(half(), RENORMALISED, which=(POSITIVE, NEGATIVE))(which, options, before, after)

    close(found, sample(by_matrix(model, weigh), both, negative))


def test_at_guidance_1_there_is_no_negative_prompt(model):
    found = sample(apply(model, half(), words_of(prompts()[0]), mask_uncond=True), *prompts(), cfg=1.0)
    close(found, sample(by_matrix(model, weigh_words(half(), RENORMALISED)), *prompts(), cfg=1.0))


@pytest.mark.parametrize("mask_uncond", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, 40], ids=["one call", "separate calls"])
def test_dual_guidance_counts_its_prompts_otherwise(model, tokens, mask_uncond):
    """There the host's 0 is the negative prompt, 1 the second one, which it takes for negative too, 2 the first."""
    conds = {"cond1": prompts()[0], "cond2": tiny_models.prompt(4, tokens), "negative": prompts()[1]}
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)

    def guided(model):
        settings = {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0, "style": "regular"}
        guider = tiny_models.execute(DualCFGGuider, model=model, **conds, **settings)[0]
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(start(), torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True, seed=1)

    ours = apply(model, half(), words_of(conds["cond1"]), mask_uncond=mask_uncond)
    which = (0, 1, 2) if mask_uncond else (2,)
    close(guided(ours), guided(by_matrix(model, weigh_words(half(), RENORMALISED, which=which))))


def test_rows_are_told_by_the_prompt_not_by_their_order(model):
    """With the prompts exchanged, the words are in what the host calls negative, and are masked there."""
    positive, negative = prompts()
    found = sample(apply(model, half(), words_of(positive)), negative, positive)
    weigh = weigh_words(half(), RENORMALISED, which=(NEGATIVE,))
    close(found, sample(by_matrix(model, weigh), negative, positive))


# ---- places


def in_area(prompt, x, y, width, height):
    inputs = {"conditioning": prompt, "x": x, "y": y, "width": width, "height": height, "strength": 1.0}
    return tiny_models.execute(nodes.ConditioningSetArea, **inputs)[0]


def test_a_prompt_limited_to_an_area_has_its_part_of_the_mask(model):
    (first, negative), mask = prompts(), torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(2))
    both = tiny_models.prompt(5) + in_area(first, 32, 16, 32, 48)
    found = sample(apply(model, mask, words_of(first)), both, negative)

    def weigh(which, options, before, after):
        if tuple(options["original_shape"][-2:]) == (6, 4) and which == POSITIVE:
            weigh_words(mask[:, 16:, 32:], RENORMALISED)(which, options, before, after)

    close(found, sample(by_matrix(model, weigh), both, negative))
    differ(found, sample(model, both, negative))


@pytest.mark.parametrize("bounds", ["default", "mask bounds"])
def test_beside_prompts_limited_by_a_mask(model, bounds):
    first, negative = prompts()
    right = torch.zeros(1, 64, 64)
    right[..., 32:] = 1
    mask = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(2))
    inputs = {"conditioning": first, "mask": right, "set_cond_area": bounds, "strength": 1.0}
    both = tiny_models.prompt(5) + tiny_models.execute(nodes.ConditioningSetMask, **inputs)[0]
    found = sample(apply(model, mask, words_of(first)), both, negative)
    differ(found, sample(model, both, negative))
    painted = mask.clone()
    painted[..., :32] = 0
    elsewhere = sample(apply(model, painted, words_of(first)), both, negative)
    assert torch.equal(found, elsewhere) == (bounds == "mask bounds")  # then that side is outside of the crop


@pytest.mark.parametrize(("height", "width"), [(9, 7), (11, 8), (5, 12)])
def test_odd_sizes(model, height, width):
    latent, mask = start(height, width), torch.rand(1, 50, 31, generator=torch.Generator().manual_seed(2))
    found = sample(apply(model, mask, words_of(prompts()[0]), mode=AFTER), *prompts(), latent)
    close(found, sample(by_matrix(model, weigh_words(mask, AFTER)), *prompts(), latent))


@pytest.mark.parametrize("mode", [AFTER, RENORMALISED])
def test_each_picture_of_a_batch_has_its_mask(model, mode):
    tokens, latents = words_of(prompts()[0]), start(pictures=3)
    masks = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(2)).round()
    together = sample(apply(model, masks, tokens, mode=mode), *prompts(), latents)
    one_for_all = sample(apply(model, masks[:1], tokens, mode=mode), *prompts(), latents)
    for i in range(3):
        alone = sample(apply(model, masks[i : i + 1], tokens, mode=mode), *prompts(), latents[i : i + 1])
        close(together[i : i + 1], alone)
    close(one_for_all[:1], together[:1])
    differ(one_for_all[1:], together[1:])


# ---- several regions


def test_regions_multiply_in_any_order(model):
    (first, negative), other = prompts(), half().flip(-2).mT
    one, two = words_of(first, 2, 3), words_of(first, 3, 5)
    both = sample(apply(apply(model, half(), one), other, two, mode=AFTER), first, negative)
    close(both, sample(apply(apply(model, other, two, mode=AFTER), half(), one), first, negative))

    def weigh(which, options, before, after):
        weigh_words(half(), RENORMALISED, (2, 3))(which, options, before, after)
        weigh_words(other, AFTER, (3, 5))(which, options, before, after)

    close(both, sample(by_matrix(model, weigh), first, negative))


def test_regions_of_two_prompts_leave_each_other_alone(model):
    (first, negative), second = prompts(), tiny_models.prompt(5)
    mask = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(2))
    ours = apply(apply(model, half(), words_of(first, 1)), mask, words_of(second, 4))
    found = sample(ours, first + second, negative)

    def weigh(which, options, before, after):
        if which == POSITIVE:
            weight = {0: (1, half()), 1: (4, mask)}[calls[0] % 2]
            before[..., weight[0]] *= grid(weight[1], options)[..., 0]
            calls[0] += 1

    calls = [1]  # of one call's rows the host puts the later prompt first
    close(found, sample(by_matrix(model, weigh), first + second, negative))


def test_regions_in_different_layers_and_at_different_times(model):
    tokens = words_of(prompts()[0])
    early = {"layers": "1/1 of the latent", "end_percent": 0.5}
    both = sample(apply(apply(model, half(), tokens, **early), half(), tokens, layers="custom", custom_layers="middle"),
                  *prompts(), steps=4)  # fmt: skip
    only = sample(apply(model, half(), tokens, **early), *prompts(), steps=4)
    differ(both, only)


def test_a_chain_of_nodes_does_not_change_the_models_before_it(model, plain):
    tokens = words_of(prompts()[0])
    one = apply(model, half(), tokens)
    alone = sample(one, *prompts())
    two = apply(one, 1 - half(), tokens)
    differ(sample(two, *prompts()), alone)
    assert torch.equal(sample(one, *prompts()), alone)
    assert torch.equal(sample(one.clone(), *prompts()), alone)
    assert torch.equal(sample(model, *prompts()), plain)


# ---- memory of a run


def test_masks_are_prepared_once_a_run_and_grid(model, monkeypatch):
    built = []
    build = cross_attention.Call.build
    monkeypatch.setattr(
        cross_attention.Call, "build", lambda self, regions, *rest: built.append(rest) or build(self, regions, *rest)
    )
    patched = apply(model, half(), words_of(prompts()[0]))
    sample(patched, *prompts(), steps=4)
    assert len(built) == len({rest[1:3] for rest in built}) == 2
    sample(patched, *prompts(), start(16, 16), steps=1)
    assert len(built) == 4


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
    cross_attention.attach(listening, layers, recorders=(record,))
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


# ---- refusals


def test_words_of_a_prompt_that_is_not_sampled_are_refused(model):
    averaged = [[0.5 * prompts()[0][0][0] + 0.5 * prompts()[1][0][0], {}]]
    with pytest.raises(ValueError, match=r"'word'.*in no prompt that is sampled.*Select Words"):
        sample(apply(model, half(), words_of(prompts()[0])), averaged, prompts()[1])


@pytest.mark.parametrize("mode", [RENORMALISED, PFB])
def test_every_token_in_a_mode_that_only_moves_attention_is_refused(model, mode):
    with pytest.raises(ValueError, match="connect tokens from Select Words, or take mode 'after softmax'"):
        apply(model, half(), mode=mode)


def test_masks_that_are_none_are_refused(model):
    tokens = words_of(prompts()[0])
    with pytest.raises(ValueError, match="holds NaN"):
        apply(model, torch.full((1, 8, 8), torch.nan), tokens)
    with pytest.raises(ValueError, match="the mask has 2 pictures, the batch has 1"):
        sample(apply(model, torch.rand(2, 8, 8), tokens), *prompts())


def test_percents_in_the_wrong_order_are_refused(model):
    with pytest.raises(ValueError, match=r"end_percent 0.2 lies before start_percent 0.6"):
        apply(model, half(), words_of(prompts()[0]), start_percent=0.6, end_percent=0.2)


# ---- cost, counted at full size


@pytest.mark.parametrize("regions", counting_masks.MASKED)
@pytest.mark.parametrize("name", counting.FAMILIES)
def test_eight_regions_in_all_layers_cost_half_a_percent_at_most(name, regions):
    family = counting.FAMILIES[name]
    model = counting.build(family)
    plain = counting_masks.later_step(model, family)
    found = counting_masks.later_step(counting_masks.masked(model, family, regions), family)
    assert max(found.h200 / plain.h200, found.rtx4090 / plain.rtx4090) <= 1.005
    assert found.ops - plain.ops <= 2 * len(host.cross_attention_layers(model))
    assert found.waits == plain.waits == 0
