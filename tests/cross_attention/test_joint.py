"""Cross-Attention Mask on transformers: against the matrix written out, how words leak, and what may not change.

Each family's traps stand here: Flux.2 pads in front, Z-Image to 32 and mixes words before, Qwen gives its mask by
position, SD 3 tells no layer and lays its heads out otherwise, SD 3.5 has attention of the picture alone.
"""

import math
from types import SimpleNamespace

import pytest
import tiny_transformers
import torch
from comfy.patcher_extension import WrappersMP
from cross_attention.hidden_words import (
    AFTER,
    PFB,
    RENORMALISED,
    TEXT,
    WORDS,
    apply,
    both,
    close,
    half,
    relative,
    words_of,
)
from palimpsest.kernels.cross_attention_mask import masked as masked_attention
from palimpsest.nodes import host
from palimpsest.nodes.cross_attention.layers import choose_layers
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.host import joint
from tiny_transformers import FAMILIES, latent, prompt, sample

MULTIPLE = {"zimage": 32}
PATCH = {"flux2": 1}
REFINED = ("zimage", "lumina2")
TIGHT = {"hide_from_text": True, "hide_from_refiner": True}

pytestmark = pytest.mark.usefixtures("inference")


# ---- the same with the matrix written out; where tokens stand is told by this file alone


def text_tokens(family, length=TEXT):
    """(tokens of the text in the sequence, the first of the prompt)."""
    if family == "flux2":
        return 512, 512 - length
    multiple = MULTIPLE.get(family, 1)
    return -(-length // multiple) * multiple, 0


def by_matrix(family, model, mask, mode=RENORMALISED, text=False, refiner=False, length=TEXT):
    """A clone whose attention is a matrix that a mask of one picture was multiplied into, for the positive prompt."""
    count, first = text_tokens(family, length)
    side = [-(-cells // PATCH.get(family, 2)) for cells in FAMILIES[family].side]
    places = torch.nn.functional.adaptive_avg_pool2d(mask[:, None], side).flatten()
    places = (places >= 0.5).float() if mode == PFB else places
    own = [first + word for word in WORDS]
    refined = {}

    def weight(tokens, options):
        if tokens == count and family in REFINED and "block_index" not in options:
            call = refined.setdefault(id(options["sigmas"]), [0])
            call[0] += 1
            if call[0] > 2 or not refiner:  # the picture's own refiner is behind the text's
                return None
            weights = torch.zeros(tokens)
        elif tokens <= len(places):
            return None
        else:
            weights = torch.zeros(tokens) if text else torch.ones(tokens)
            weights[count : count + len(places)] = places
        weights[own] = 1
        return weights

    def attend(function, q, k, v, heads, mask=None, skip_reshape=False, **named):
        options = named["transformer_options"]
        if not skip_reshape:
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        found = weight(q.shape[2], options)
        scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores + mask[:, None].double()
        before, after = torch.ones(2, len(q), 1, q.shape[2], k.shape[2], dtype=torch.float64)
        for chunk, rows in zip(options["cond_or_uncond"], range(len(q)), strict=True):
            if chunk == 0 and found is not None:
                (after if mode == AFTER else before)[rows, 0, :, own] *= found[:, None]
        return (masked_attention(scores, before, after) @ v.double()).float().transpose(1, 2).flatten(2)

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = attend
    return patched


@pytest.mark.parametrize("mode", [AFTER, RENORMALISED, PFB])
@pytest.mark.parametrize("family", FAMILIES)
def test_words_act_as_the_written_out_matrix_has_it(models, family, mode):
    model, (positive, negative) = models(family), both(family)
    plain = sample(model, positive, negative, latent(family))
    found = sample(apply(model, half(), words_of(positive), mode=mode), positive, negative, latent(family))
    close(found, sample(by_matrix(family, model, half(), mode), positive, negative, latent(family)), 2e-5)
    assert relative(found, plain) > 1e-3


@pytest.mark.parametrize("family", ["flux2", "zimage", "sd3"])
def test_so_they_do_where_other_text_and_the_refiner_are_closed_too(models, family):
    model, (positive, negative) = models(family), both(family)
    found = sample(apply(model, half(), words_of(positive), **TIGHT), positive, negative, latent(family))
    matrix = by_matrix(family, model, half(), text=True, refiner=True)
    close(found, sample(matrix, positive, negative, latent(family)), 2e-5)


def watched(model):
    """(a clone that keeps its joint attentions and those that refine text, what it kept)."""
    patched, seen = model.clone(), []
    host.replace_joint(patched, host.family_of(model), "look", lambda earlier: seen.append)
    return patched, seen


def acts_of(model):
    return dict(model.get_wrappers(WrappersMP.APPLY_MODEL, joint.JOINT)[0].acts)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_attention_by_split_queries_is_the_masked_one_to_a_millionth(models, family):
    """Within a layer, before differences grow."""
    positive, negative = both(family)
    looking, seen = watched(models(family))
    ours = apply(looking, half(), words_of(positive))
    sample(ours, positive, negative, latent(family))
    attention = next(each for each in seen if each.layer is not None and 0 in each.options["cond_or_uncond"])
    count, first = text_tokens(family)
    q, k, v = (tensor.double() for tensor in (attention.query, attention.key, attention.value))
    before = torch.ones(len(q), 1, q.shape[2], k.shape[2], dtype=torch.float64)
    places = torch.nn.functional.adaptive_avg_pool2d(half()[:, None], attention.sequence.grid).flatten()
    row = attention.options["cond_or_uncond"].index(0)
    before[row, 0, count : count + len(places), [first + word for word in WORDS]] *= places[:, None]
    wanted = masked_attention(q @ k.mT / math.sqrt(q.shape[-1]), before, torch.ones_like(before)) @ v
    close(acts_of(ours)["words"](attention), wanted.transpose(1, 2).flatten(2), 1e-6)


# ---- on which ways a word reaches the picture


def exchanged(positive):
    """The same prompt with other words in their places."""
    text = positive[0][0].clone()
    text[:, list(WORDS)] = torch.randn(1, len(WORDS), text.shape[-1], generator=torch.Generator().manual_seed(9))
    return [[text, positive[0][1]]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_word_reaches_nothing_once_all_ways_are_closed(models, family):
    """Nowhere to act: how far the picture moves if the word is another one, by how much is closed."""
    model, (positive, negative), nowhere = models(family), both(family), torch.zeros(1, 96, 64)
    other = exchanged(positive)

    def moved(**settings):
        pictures = [
            sample(apply(model, nowhere, words_of(each), **settings), each, negative, latent(family))
            for each in (other, positive)
        ]
        return relative(*pictures)

    some, text, everything = moved(), moved(hide_from_text=True), moved(**TIGHT)
    whole = relative(*(sample(model, each, negative, latent(family)) for each in (other, positive)))
    print(f"{family}: {some / whole:.2f} picture, {text / whole:.2f} and text, {everything / whole:.2f} and refiner")
    assert some > 1e-4
    assert everything == 0
    assert (text > 0) == (family in REFINED)


@pytest.mark.parametrize("family", ["flux", "zimage"])
def test_without_tokens_the_picture_beyond_the_mask_sees_no_text(models, family):
    model, (positive, negative), nowhere = models(family), both(family), torch.zeros(1, 96, 64)
    pooled = positive[0][1]
    other = [[prompt(family, 8, TEXT)[0][0], pooled]]
    closed = apply(model, nowhere, None, hide_from_text=family == "zimage")  # tokens that pad its picture look at text
    found, same = (sample(closed, each, negative, latent(family)) for each in (positive, other))
    assert torch.equal(found, same)


# ---- what may not change


@pytest.mark.parametrize(
    "settings",
    [
        {"mask": torch.ones(1, 96, 64)},
        {"mask": torch.ones(1, 96, 64), **TIGHT},
        {"mask": torch.zeros(1, 96, 64), "side": "outside"},
        {"mask": half(), "strength": 0.0},
        {"mask": half(), "start_percent": 0.97, "end_percent": 0.98},
    ],
    ids=["white", "white, closed", "black, outside", "strength 0", "between two steps"],
)
@pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "qwen", "zimage"])
def test_where_nothing_is_hidden_the_picture_is_the_models_bit_for_bit(models, family, settings):
    model, (positive, negative) = models(family), both(family)
    patched = apply(model, tokens=words_of(positive), **settings)
    found = sample(patched, positive, negative, latent(family))
    assert torch.equal(found, sample(model, positive, negative, latent(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_as_it_was(models, family):
    model, (positive, negative) = models(family), both(family)
    plain, options = sample(model, positive, negative, latent(family)), str(model.model_options)
    sample(apply(model, half(), words_of(positive), **TIGHT), positive, negative, latent(family))
    assert str(model.model_options) == options
    assert torch.equal(sample(model, positive, negative, latent(family)), plain)


# ---- traps


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_other_lengths_are_two_calls_and_the_words_are_found_in_both(models, family):
    model, (positive, negative) = models(family), both(family, negative=14)
    looking, seen = watched(model)
    found = sample(apply(looking, half(), words_of(positive)), positive, negative, latent(family))
    close(found, sample(by_matrix(family, model, half()), positive, negative, latent(family)), 2e-5)
    groups = {tuple(each.options["cond_or_uncond"]) for each in seen}
    assert groups == ({(1, 0)} if family == "flux2" else {(0,), (1,)})


@pytest.mark.parametrize("family", ["flux2", "qwen"])
def test_the_negative_prompt_is_masked_at_the_same_places(models, family):
    model, (positive, negative) = models(family), both(family)
    found = sample(apply(model, half(), words_of(positive), mask_negative=True), positive, negative, latent(family))
    own = sample(apply(model, half(), words_of(positive)), positive, negative, latent(family))
    twice = apply(apply(model, half(), words_of(positive)), half(), words_of(negative))
    close(found, sample(twice, positive, negative, latent(family)))
    assert relative(found, own) > 1e-4


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen", "zimage"])
def test_each_picture_of_a_batch_has_its_own_mask(models, family):
    model, (positive, negative) = models(family), both(family)
    masks = torch.cat([half(), half().flip(2)])
    found = sample(apply(model, masks, words_of(positive), **TIGHT), positive, negative, latent(family, 2))
    for row in range(2):
        one = sample(apply(model, masks[[row]], words_of(positive), **TIGHT), positive, negative, latent(family, 2))
        close(found[[row]], one[[row]], 1e-5)
    assert relative(found[1], found[0]) > 1e-3


def test_two_regions_are_chained_and_a_word_in_both_has_both_masks(models):
    model, (positive, negative) = models("flux"), both("flux")
    first, second = words_of(positive, 3, 4), words_of(positive, 4, 5)
    for mode in (AFTER, RENORMALISED):
        chained = apply(apply(model, half(), first, mode=mode), half().flip(2), second, mode=mode)
        nowhere = half() * half().flip(2)
        apart = model
        for mask, token in ((half(), 3), (nowhere, 4), (half().flip(2), 5)):
            apart = apply(apart, mask, words_of(positive, token), mode=mode)
        close(
            sample(chained, positive, negative, latent("flux")), sample(apart, positive, negative, latent("flux")), 1e-3
        )


def test_outside_is_inside_of_the_inverted_mask(models):
    model, (positive, negative) = models("qwen"), both("qwen")
    outside = sample(apply(model, half(), words_of(positive), side="outside"), positive, negative, latent("qwen"))
    inverted = sample(apply(model, 1 - half(), words_of(positive)), positive, negative, latent("qwen"))
    close(outside, inverted, 1e-5)


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen"])
def test_reference_pictures_stand_behind_the_picture_and_hand_words_on_unless_closed(models, family):
    """The tokens of a reference picture are looked at by the picture, and look at the words."""
    model, (positive, negative) = models(family), both(family)
    reference = torch.randn(latent(family, side=(4, 4)).shape, generator=torch.Generator().manual_seed(5))
    positive = [[positive[0][0], positive[0][1] | {"reference_latents": [reference]}]]
    plain = sample(model, positive, negative, latent(family))
    found = sample(apply(model, half(), words_of(positive)), positive, negative, latent(family))
    close(found, sample(by_matrix(family, model, half()), positive, negative, latent(family)), 2e-5)
    assert relative(found, plain) > 1e-4
    nowhere = torch.zeros(1, 96, 64)
    closed = [
        sample(apply(model, nowhere, words_of(each), **TIGHT), each, negative, latent(family))
        for each in (positive, exchanged(positive))
    ]
    assert torch.equal(*closed)


def test_reference_pictures_in_z_image_are_refused(models):
    reference = torch.randn(latent("zimage").shape, generator=torch.Generator().manual_seed(5))
    positive, negative = prompt("zimage", 1, TEXT, reference_latents=[reference]), prompt("zimage", 2, TEXT)
    with pytest.raises(
        ValueError, match=r"reference pictures stand in front of the picture in Z-Image.*take Reference"
    ):
        sample(apply(models("zimage"), half(), words_of(positive)), positive, negative, latent("zimage"))


def test_qwens_own_mask_by_position_still_acts(models):
    """Its conditioning names padding that nobody may see."""
    model, (positive, negative) = models("qwen"), both("qwen")
    seen = torch.ones(1, TEXT, dtype=torch.long)
    seen[:, -3:] = 0
    masked = [[positive[0][0], {"attention_mask": seen}]]
    found = sample(apply(model, half(), words_of(positive), **TIGHT), masked, negative, latent("qwen"))
    changed = positive[0][0].clone()
    changed[:, -3:] = 7
    other = [[changed, {"attention_mask": seen}]]
    close(found, sample(apply(model, half(), words_of(other), **TIGHT), other, negative, latent("qwen")), 1e-5)
    assert (
        relative(found, sample(apply(model, half(), words_of(positive), **TIGHT), positive, negative, latent("qwen")))
        > 1e-3
    )


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_another_nodes_attention_is_used_whether_it_is_set_before_or_after(models, family, order):
    """There is one place for an override; some write into it without a look."""
    calls = []

    def theirs(function, *args, **kwargs):
        calls.append(args[0].shape)
        return function(*args, **kwargs)

    def put(patched):
        patched = patched.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = theirs
        return patched

    model, (positive, negative) = models(family), both(family)
    wanted = sample(apply(model, half(), words_of(positive)), positive, negative, latent(family))
    assert not calls
    patched = (
        put(apply(model, half(), words_of(positive)))
        if order == "after"
        else apply(put(model), half(), words_of(positive))
    )
    assert torch.equal(sample(patched, positive, negative, latent(family)), wanted)
    assert calls


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_another_nodes_block_replacement_still_acts(models, family):
    """Feature nodes replace blocks; in SD 3 ours tells the layer's number around theirs."""
    seen = []

    def theirs(args, extra):
        seen.append(args["transformer_options"].get("block_index"))
        return extra["original_block"](args)

    model, (positive, negative) = models(family), both(family)
    patched = model.clone()
    patched.set_model_patch_replace(theirs, "dit", "double_block", 1)
    wanted = sample(apply(model, half(), words_of(positive)), positive, negative, latent(family))
    assert torch.equal(sample(apply(patched, half(), words_of(positive)), positive, negative, latent(family)), wanted)
    assert set(seen) == {1}


def test_a_gradient_goes_through_sd_3_whose_replaced_blocks_are_computed_twice(models):
    """The host runs them under torch's checkpoint."""
    with torch.inference_mode(False), torch.enable_grad():
        model, positive = tiny_transformers.model("sd3", inference=False), prompt("sd3", 1, TEXT)
        looking, seen = watched(model)
        patched = apply(looking, half(), words_of(positive), **TIGHT)
        network = patched.model.diffusion_model
        for weight in network.parameters():
            weight.requires_grad_(False)
        x = torch.randn(1, 16, 12, 8, requires_grad=True)
        call = host.ModelCall(
            torch.ones(1), (host.Prompt(positive[0][0], False),), (None,), 1, (12, 8), TEXT, patched.model, host.Run()
        )
        options = {"cond_or_uncond": [0], "uuids": [0], "sigmas": torch.ones(1), joint.NAME: call}
        adapter = patched.get_wrappers(WrappersMP.APPLY_MODEL, joint.JOINT)[0]
        run = Bare(patched.model)
        out = adapter(run, x, torch.ones(1), None, positive[0][0], None, options, y=positive[0][1]["pooled_output"])
        out.square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert [each.layer for each in seen] == [("double", 0, 0), ("double", 1, 0), ("double", 1, 0), ("double", 0, 0)]


class Bare:
    """Stands for the host's executor: its network itself."""

    def __init__(self, model):
        self.class_obj = model

    def __call__(self, x, t, c_concat, c_crossattn, control, options, y):
        return self.class_obj.diffusion_model(x, t, context=c_crossattn, y=y, transformer_options=options)


def test_a_node_that_drops_tokens_is_named_instead_of_a_mask_in_the_wrong_place(models):
    model, (positive, negative) = models("flux"), both("flux")
    patched = apply(model, half(), words_of(positive))

    def drop(q, k, v, pe, attn_mask, extra_options):
        return {"q": q[:, :, :-5], "k": k[:, :, :-5], "v": v[:, :, :-5], "pe": pe[:, :, :-5]}

    patched.set_model_attn1_patch(drop)
    with pytest.raises(ValueError, match=r"FLUX.1 has 28 tokens in 2 rows, and text and picture are 33 in 2"):
        sample(patched, positive, negative, latent("flux"))


# ---- layers, refusals, reports


def test_layers_of_a_transformer_have_names(models):
    model = models("flux")
    assert [str(layer) for layer in choose_layers(model, "all")] == [
        "double 0.0",
        "double 1.0",
        "single 0.0",
        "single 1.0",
    ]
    assert choose_layers(model, "1/2 of the latent") == choose_layers(model, "all")
    assert [layer.key for layer in choose_layers(model, "custom", "double 1, single")] == [
        ("double", 1, 0), ("single", 0, 0), ("single", 1, 0),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"looks at the prompt at 1/2 of the latent, not in layers 'PFB-Diff object'"):
        choose_layers(model, "PFB-Diff object")
    with pytest.raises(ValueError, match=r"'input 7-8' is no such layer\. .* double 0, 1; single 0, 1"):
        choose_layers(model, "custom", "input 7-8")


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_it_acts_in_the_chosen_layers_only(models, family):
    model, (positive, negative) = models(family), both(family)
    patched = apply(model, half(), words_of(positive), layers="custom", custom_layers="double 1")
    looking, seen = watched(model)
    sample(
        apply(looking, half(), words_of(positive), layers="custom", custom_layers="double 1"),
        positive,
        negative,
        latent(family),
    )
    words = acts_of(patched)["words"]
    assert {each.layer for each in seen if words.parts(each) is not None} == {("double", 1, 0)}
    everywhere = sample(apply(model, half(), words_of(positive)), positive, negative, latent(family))
    assert relative(sample(patched, positive, negative, latent(family)), everywhere) > 1e-4


@pytest.mark.parametrize(
    ("kind", "missing"),
    {
        "HiDream": "the host does not tell its attention which layer it is",
        "WAN21_Vace": "it reads other pictures or sound beside the clip in layers of their own",
        "PixArt": "the host lets no other node into its attention",
        "SomethingNew": "where its words stand is not described yet",
    }.items(),
)
def test_models_that_are_not_served_are_refused_by_name_with_what_is_missing(kind, missing):
    patcher = SimpleNamespace(model=type(kind, (), {"diffusion_model": torch.nn.Linear(1, 1)})())
    with pytest.raises(ValueError, match=rf"Mask works inside .* the connected model is {kind}: {missing}"):
        host.require_words(patcher, "Cross-Attention Mask")


def test_the_report_says_on_which_ways_words_still_go():
    def told(family, **settings):
        positive = prompt(family, 1, TEXT)
        inputs = {"mask": half(), "tokens": words_of(positive), "mode": RENORMALISED} | settings
        made = CrossAttentionMask.execute(tiny_transformers.model(family), **inputs)
        return made.ui["text"][0] if isinstance(made.ui, dict) else made.ui.as_dict()["text"][0]

    assert "hide_from_text), through the layers that refine the prompt (hide_from_refiner)" in told("zimage")
    assert "still reach" not in told("zimage", **TIGHT)
    assert "still reach the rest of it in the prompt's pooled vector" in told("sd3", **TIGHT)
