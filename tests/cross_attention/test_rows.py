"""Cross-Attention Mask in the host: which rows of a call, which places of a picture, several regions."""

import math

import comfy.samplers
import pytest
import tiny_models
import torch
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from cross_attention.masked import (
    AFTER,
    NEGATIVE,
    POSITIVE,
    RENORMALISED,
    STEPS,
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

import nodes

pytestmark = pytest.mark.usefixtures("inference")


# ---- rows


@pytest.mark.parametrize("mask_negative", [False, True])
@pytest.mark.parametrize("lengths", [(TOKENS, 40), (40, TOKENS)])
def test_prompts_that_run_in_calls_of_their_own(model, lengths, mask_negative):
    both = prompts(lengths=lengths)
    which = (POSITIVE, NEGATIVE) if mask_negative else (POSITIVE,)
    found = sample(apply(model, half(), words_of(both[0]), mask_negative=mask_negative), *both)
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
    found = sample(apply(model, half(), words_of(both[0], 5, 9), mask_negative=True), *both)

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
    found = sample(apply(model, half(), words_of(first), mask_negative=True), both, negative)

    def weigh(which, options, before, after):
        if before.shape[-1] == TOKENS:
            weigh_words(half(), RENORMALISED, which=(POSITIVE, NEGATIVE))(which, options, before, after)

    close(found, sample(by_matrix(model, weigh), both, negative))


def test_at_guidance_1_there_is_no_negative_prompt(model):
    found = sample(apply(model, half(), words_of(prompts()[0]), mask_negative=True), *prompts(), cfg=1.0)
    close(found, sample(by_matrix(model, weigh_words(half(), RENORMALISED)), *prompts(), cfg=1.0))


@pytest.mark.parametrize("mask_negative", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, 40], ids=["one call", "separate calls"])
def test_dual_guidance_counts_its_prompts_otherwise(model, tokens, mask_negative):
    """There the host's 0 is the negative prompt, 1 the second one, which it takes for negative too, 2 the first."""
    conds = {"cond1": prompts()[0], "cond2": tiny_models.prompt(4, tokens), "negative": prompts()[1]}
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)

    def guided(model):
        settings = {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0, "style": "regular"}
        guider = tiny_models.execute(DualCFGGuider, model=model, **conds, **settings)[0]
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(start(), torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True, seed=1)

    ours = apply(model, half(), words_of(conds["cond1"]), mask_negative=mask_negative)
    which = (0, 1, 2) if mask_negative else (2,)
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
