"""Cross-Attention Mask in the host: what it does, when, in which layers, and what it refuses."""

import pytest
import tiny_models
import torch
from cross_attention.masked import (
    AFTER,
    NEGATIVE,
    PFB,
    POSITIVE,
    RENORMALISED,
    TOKENS,
    apply,
    by_matrix,
    close,
    differ,
    half,
    prompts,
    sample,
    weigh_words,
    words_of,
)
from palimpsest.kernels.cross_attention_mask import feathered
from palimpsest.nodes import host
from palimpsest.nodes.cross_attention import masking
from palimpsest.nodes.cross_attention.layers import choose_layers
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.cross_attention.regions import MODES

pytestmark = pytest.mark.usefixtures("inference")


# ---- what it does


@pytest.mark.parametrize("mask_negative", [False, True])
@pytest.mark.parametrize("mode", [AFTER, RENORMALISED, PFB])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_words_act_as_the_written_out_matrix_has_it(family, mode, mask_negative):
    model, both = tiny_models.unet(family), prompts(family)
    ours = apply(model, half(), words_of(both[0]), mode=mode, mask_negative=mask_negative)
    which = (POSITIVE, NEGATIVE) if mask_negative else (POSITIVE,)
    found = sample(ours, *both)
    close(found, sample(by_matrix(model, weigh_words(half(), mode, which=which)), *both))
    differ(found, sample(model, *both))


@pytest.mark.parametrize("mask_negative", [False, True])
def test_without_tokens_every_token_is_masked_as_in_the_paper(model, plain, mask_negative):
    which = (POSITIVE, NEGATIVE) if mask_negative else (POSITIVE,)
    found = sample(apply(model, half(), mask_negative=mask_negative), *prompts())
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
        {"mask": half(), "start_percent": 0.6, "end_percent": 0.7},
    ],
    ids=["white", "white, feathered", "black, outside", "strength 0", "between two steps"],
)
@pytest.mark.parametrize("mode", [AFTER, RENORMALISED, PFB, None])
def test_where_nothing_is_masked_the_picture_is_the_models_bit_for_bit(model, plain, mode, settings):
    both = prompts()
    tokens, settings = (None, settings) if mode is None else (words_of(both[0]), settings | {"mode": mode})
    assert torch.equal(sample(apply(model, tokens=tokens, mask_negative=True, **settings), *both), plain)


def test_the_model_stays_as_it_was(model, plain):
    options = str(model.model_options)
    patched = apply(model, half(), words_of(prompts()[0]))
    ours = set(patched.model_options["transformer_options"])
    sample(patched, *prompts())
    assert str(model.model_options) == options
    assert set(patched.model_options["transformer_options"]) == ours
    assert torch.equal(sample(model, *prompts()), plain)


def test_every_input_arrives_where_it_acts(model, monkeypatch):
    chosen = {
        "mode": PFB, "side": "outside", "strength": 0.3, "feather": 4.0, "layers": "custom", "custom_layers": "middle",
        "mask_negative": False, "start_percent": 0.2, "end_percent": 0.7, "hide_from_picture": False,
        "hide_from_text": True, "hide_from_refiner": True,
    }  # fmt: skip
    sockets = {"model", "mask", "tokens"}
    assert {entry.id for entry in CrossAttentionMask.define_schema().inputs} == set(chosen) | sockets
    attached, tokens = [], words_of(prompts()[0])
    monkeypatch.setattr(masking, "attach", lambda patched, layers, regions: attached.append((layers, *regions)))
    CrossAttentionMask.execute(model, half(), tokens=tokens, **chosen)
    ((layers, region),) = attached
    assert layers == choose_layers(model, "custom", "middle")
    assert region.layers == {layer.key for layer in layers}
    assert (region.words, region.mode, region.outside) == (tokens, MODES[PFB], True)
    assert (region.strength, region.mask_negative) == (0.3, False)
    assert region.window == host.Window.of(model, 0.2, 0.7)
    assert torch.equal(region.mask, feathered(half(), 4.0))
    assert (region.hidden.picture, region.hidden.text, region.hidden.refiner) == (False, True, True)


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
    chosen = choose_layers(model, layers, "middle, output 0")
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
    chosen = choose_layers(model, preset)
    assert chosen == choose_layers(model, "custom", custom)
    assert chosen


def test_one_of_several_layers_in_a_block():
    model = tiny_models.unet_without_weights("sdxl-full")
    chosen = choose_layers(model, "custom", "Output 0.3,middle.9 , input 4 - 5.1")
    assert [str(layer) for layer in chosen] == ["input 4.1", "input 5.1", "middle 0.9", "output 0.3"]


@pytest.mark.parametrize("custom", ["input 3", "output 12-14", "bottleneck", "middle.1", "input 7-"])
def test_a_custom_layer_that_is_not_there_is_answered_with_what_is(custom):
    model = tiny_models.unet_without_weights("sd15-full")
    with pytest.raises(ValueError, match="input 1, 2, 4, 5, 7, 8; middle; output 3, 4, 5, 6, 7, 8, 9, 10, 11"):
        choose_layers(model, "custom", f"middle, {custom}")


def test_no_layer_at_all_is_refused():
    model = tiny_models.unet_without_weights("sdxl-full")
    with pytest.raises(ValueError, match="custom_layers is empty"):
        choose_layers(model, "custom", " , ")
    with pytest.raises(ValueError, match="1/2, 1/4 of the latent, not in layers '1/8 of the latent'"):
        choose_layers(model, "1/8 of the latent")


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


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.2), (0.6, 0.6), (1.0, 1.0)])
def test_percents_that_leave_no_step_are_refused(model, start, end):
    with pytest.raises(ValueError, match=rf"start_percent {start:g} and end_percent {end:g} leave no step"):
        apply(model, half(), words_of(prompts()[0]), start_percent=start, end_percent=end)
