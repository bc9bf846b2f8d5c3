"""Cross-Attention Mask where the picture looks at text in an attention of its own: Wan, and Anima.

Anima makes another text of what its text encoder gave, by T5's tokens; without those the encoded text is looked at.
"""

import itertools
import math

import pytest
import tiny_models
import tiny_transformers
import torch
from comfy.patcher_extension import WrappersMP
from cross_attention import hidden_words
from cross_attention.hidden_words import AFTER, PFB, RENORMALISED, TEXT, WORDS, apply, both, half, relative, words_of
from palimpsest.kernels.cross_attention_mask import masked as masked_attention
from palimpsest.nodes import host
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask, RegionPhrase
from palimpsest.nodes.cross_attention.regions import MODES
from palimpsest.nodes.host import joint
from palimpsest.nodes.words import ChosenWords
from tiny_transformers import APART, latent, prompt, sample

SERVED = list(APART)

pytestmark = pytest.mark.usefixtures("inference")


def close(found, wanted, share=2e-5):
    hidden_words.close(found, wanted, share)


def by_matrix(model, places, mode=RENORMALISED, words=WORDS):
    """A clone whose every second attention, that to text, is a matrix written out; places (N,) or (rows, N)."""
    turn = itertools.count()

    def attend(function, q, k, v, heads, mask=None, skip_reshape=False, **named):
        if not skip_reshape:
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
        before, after = torch.ones(2, *scores.shape[:1], 1, *scores.shape[2:], dtype=torch.float64)
        rows = named["transformer_options"]["cond_or_uncond"]
        if next(turn) % 2 and 0 in rows:
            first, pictures = rows.index(0), len(q) // len(rows)
            chosen = slice(first * pictures, (first + 1) * pictures)
            (after if mode == AFTER else before)[chosen, 0, :, list(words)] *= places[..., None]
        return (masked_attention(scores, before, after) @ v.double()).float().transpose(1, 2).flatten(2)

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = attend
    return patched


def on_grid(mask, mode=RENORMALISED):
    places = torch.nn.functional.adaptive_avg_pool2d(mask[:, None], (6, 4)).flatten(1)
    return (places >= 0.5).float() if mode == PFB else places


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", SERVED)
def test_words_act_as_the_written_out_matrix_has_it_in_prompts_of_one_length_and_of_two(models, family, mode):
    model, mask = models(family), half()
    for negative in (TEXT, 14):
        positive, other = both(family, negative)
        plain = sample(model, positive, other, latent(family))
        found = sample(apply(model, mask, words_of(positive), mode=mode), positive, other, latent(family))
        wanted = sample(by_matrix(model, on_grid(mask, mode), mode), positive, other, latent(family))
        close(found, wanted)
        assert relative(found, plain) > 1e-3
        assert torch.equal(sample(model, positive, other, latent(family)), plain)


@pytest.mark.parametrize("text", [24, TEXT], ids=["as many tokens of text as of the picture", "fewer"])
def test_as_many_tokens_of_text_as_of_the_picture_are_told_apart_by_their_order(models, text):
    model, (positive, negative) = models("wan"), both("wan", tokens=text)
    found = sample(apply(model, half(), words_of(positive)), positive, negative, latent("wan"))
    close(found, sample(by_matrix(model, on_grid(half())), positive, negative, latent("wan")))


def exchanged(positive):
    """The same prompt with other words in their places."""
    text = positive[0][0].clone()
    text[:, list(WORDS)] = torch.randn(1, len(WORDS), text.shape[-1], generator=torch.Generator().manual_seed(9))
    return [[text, positive[0][1]]]


@pytest.mark.parametrize("family", SERVED)
def test_there_is_no_relay_through_text_a_word_that_acts_nowhere_reaches_nothing(models, family):
    model, (positive, negative), nowhere = models(family), both(family), torch.zeros(1, 96, 64)
    pictures = [
        sample(apply(model, nowhere, words_of(each)), each, negative, latent(family))
        for each in (positive, exchanged(positive))
    ]
    assert torch.equal(*pictures)
    whole = [sample(model, each, negative, latent(family)) for each in (positive, exchanged(positive))]
    assert relative(*whole) > 1e-3


@pytest.mark.parametrize("family", SERVED)
def test_where_nothing_is_hidden_the_picture_is_the_models_bit_for_bit(models, family):
    model, (positive, negative) = models(family), both(family)
    plain = sample(model, positive, negative, latent(family))
    for settings in (
        {"mask": torch.ones(1, 96, 64)},
        {"mask": torch.zeros(1, 96, 64), "side": "outside"},
        {"mask": half(), "strength": 0.0},
        {"mask": half(), "start_percent": 0.97, "end_percent": 0.98},
    ):
        patched = apply(model, tokens=words_of(positive), **settings)
        assert torch.equal(sample(patched, positive, negative, latent(family)), plain), settings


@pytest.mark.parametrize("pictures", [3, 9], ids=["of the latent", "of the video"])
def test_each_frame_of_a_video_has_its_own_mask(models, pictures):
    """Three frames of the latent are nine of the video, of which the first stands alone."""
    model, (positive, negative) = models("wan"), both("wan")
    shifted = torch.stack([half().roll(7 * i, 2)[0] for i in range(pictures)])
    groups = [[0], *([1 + 4 * i + j for j in range(4)] for i in range(2))] if pictures == 9 else [[0], [1], [2]]
    places = torch.cat([on_grid(shifted[group].mean(0, keepdim=True)) for group in groups]).flatten()
    found = sample(apply(model, shifted, words_of(positive)), positive, negative, latent("wan", frames=3))
    close(found, sample(by_matrix(model, places), positive, negative, latent("wan", frames=3)))
    one = sample(apply(model, half(), words_of(positive)), positive, negative, latent("wan", frames=3))
    close(one, sample(by_matrix(model, on_grid(half()).repeat(1, 3)), positive, negative, latent("wan", frames=3)))
    with pytest.raises(ValueError, match=r"mask has 5 pictures, the video 9 frames \(3 in its latent\)"):
        sample(apply(model, shifted[:1].repeat(5, 1, 1), words_of(positive)), positive, negative,
               latent("wan", frames=3))  # fmt: skip


@pytest.mark.parametrize("family", SERVED)
def test_each_picture_of_a_batch_has_its_own_mask(models, family):
    model, (positive, negative) = models(family), both(family)
    masks = torch.cat([half(), half().flip(2)])
    found = sample(apply(model, masks, words_of(positive)), positive, negative, latent(family, 2))
    close(found, sample(by_matrix(model, on_grid(masks)), positive, negative, latent(family, 2)))


def test_another_nodes_attention_is_used_whether_it_is_set_before_or_after(models):
    calls = []

    def theirs(function, *args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    def put(patched):
        patched = patched.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = theirs
        return patched

    for family in ("wan", "wan22"):
        model, (positive, negative) = models(family), both(family)
        wanted = sample(apply(model, half(), words_of(positive)), positive, negative, latent(family))
        for patched in (put(apply(model, half(), words_of(positive))), apply(put(model), half(), words_of(positive))):
            calls.clear()
            assert torch.equal(sample(patched, positive, negative, latent(family)), wanted)
            assert calls


def test_vision_tokens_of_a_model_that_is_given_a_picture_are_left_alone():
    """Such a model looks at them before it looks at text; as many as those of text are told apart by their order."""
    network = tiny_transformers.WAN | {"model_type": "i2v", "in_dim": 36}
    made = tiny_transformers.model("wan")
    module = tiny_transformers.network_of(
        tiny_transformers.Tiny("WAN21_I2V", "WAN21", "wan.model.WanModel", 48, layout=network)
    )
    tiny_transformers.fill(module, 3)
    made.model.diffusion_model, made.model.image_to_video = module, True
    seen = []
    looking = made.clone()
    host.replace_joint(looking, host.family_of(made), "look", lambda earlier: seen.append)
    vision = torch.randn(1, TEXT, 1280, generator=torch.Generator().manual_seed(4))

    class Seen:
        penultimate_hidden_states = vision

    positive, negative = prompt("wan", 1, TEXT, clip_vision_output=Seen), prompt("wan", 2, 14, clip_vision_output=Seen)
    sample(apply(looking, half(), words_of(positive)), positive, negative, latent("wan"))
    kinds = [(each.sees_picture, each.sees_text, each.key.shape[2]) for each in seen]
    assert kinds.count((False, True, TEXT)) == kinds.count((False, True, 14)) == len(seen) // 4
    texts = [each.key for each in seen if each.sees_text and each.key.shape[2] == TEXT]
    context = module.text_embedding(positive[0][0])
    block = module.blocks[0].cross_attn
    close(texts[0].transpose(1, 2).flatten(2), block.norm_k(block.k(context)))
    white = apply(made, torch.ones(1, 96, 64), words_of(positive))
    assert torch.equal(*(sample(each, positive, negative, latent("wan")) for each in (made, white)))


@pytest.mark.parametrize("family", SERVED)
def test_without_tokens_the_picture_beyond_the_mask_sees_no_text(models, family):
    model, nowhere = models(family), torch.zeros(1, 96, 64)
    closed = apply(model, nowhere, None, mode=AFTER)
    found = [sample(closed, prompt(family, seed), prompt(family, 2), latent(family)) for seed in (1, 8)]
    assert torch.equal(*found)


def test_a_reference_in_front_of_the_picture_is_refused_and_one_that_no_layer_reads_is_not():
    reference = torch.randn(latent("wan").shape, generator=torch.Generator().manual_seed(5))
    positive, negative = prompt("wan", 1, TEXT, reference_latents=[reference]), prompt("wan", 2, TEXT)
    plain = tiny_transformers.model("wan")
    found = sample(apply(plain, half(), words_of(positive)), positive, negative, latent("wan"))
    close(found, sample(by_matrix(plain, on_grid(half())), positive, negative, latent("wan")))
    fun = tiny_transformers.model("wan")
    layout = tiny_transformers.WAN | {"in_dim_ref_conv": 16}
    fun.model.diffusion_model = tiny_transformers.network_of(
        tiny_transformers.Tiny("WAN21_T2V", "WAN21", "wan.model.WanModel", 48, layout=layout)
    )
    tiny_transformers.fill(fun.model.diffusion_model, 3)
    with pytest.raises(ValueError, match=r"reference pictures stand in front of the picture in Wan 2\.1"):
        sample(apply(fun, half(), words_of(positive)), positive, negative, latent("wan"))


def test_what_is_refused(models):
    model, (positive, negative) = models("wan"), both("wan")
    with pytest.raises(ValueError, match="without tokens there are none"):
        apply(model, half(), None)
    patched = apply(model, half(), words_of(positive))

    def shortens(executor, *args, **kwargs):
        return executor(*args[:2], args[2][:, :-2], *args[3:], **kwargs)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "shortens", shortens)
    with pytest.raises(ValueError, match=r"looks at 7 tokens, and the picture has 24, its text 9: another node"):
        sample(patched, positive, negative, latent("wan"))
    assert "still reach" not in told(model, positive)
    assert "(hide_from_picture)" in told(model, positive, hide_from_picture=False)


def told(model, positive, **settings):
    inputs = {"mask": half(), "tokens": words_of(positive), "mode": RENORMALISED} | settings
    made = CrossAttentionMask.execute(model, **inputs)
    return made.ui["text"][0] if isinstance(made.ui, dict) else made.ui.as_dict()["text"][0]


# ---- Anima: the text that is looked at is made by the network


def by_ids(seed=1, tokens=TEXT, length=12):
    """A prompt as Anima's text encoder gives it: rows of one tokenizer, and the other one's tokens."""
    ids = torch.randint(2, 32000, (length,), generator=torch.Generator().manual_seed(seed), dtype=torch.int)
    return prompt("anima", seed, tokens, t5xxl_ids=ids, t5xxl_weights=torch.ones(length))


def test_words_of_anima_are_rows_of_the_text_that_it_makes(models):
    """Token 10 of T5's twelve, where the encoder gave nine rows; both sides of the guidance, and one."""
    model, positive, negative = models("anima"), by_ids(), by_ids(2, 11, 14)
    words = ChosenWords(("word",), ((3, 10),), positive[0][0], length=12)
    plain = sample(model, positive, negative, latent("anima"))
    found = sample(apply(model, half(), words), positive, negative, latent("anima"))
    close(found, sample(by_matrix(model, on_grid(half()), words=(3, 10)), positive, negative, latent("anima")))
    assert relative(found, plain) > 1e-4
    white = sample(apply(model, torch.ones(1, 96, 64), words), positive, negative, latent("anima"))
    assert torch.equal(white, plain)
    assert "with which the network mixes them before" in told(model, positive)
    with pytest.raises(ValueError, match="in no prompt that is sampled"):
        sample(apply(model, half(), words), by_ids(3), negative, latent("anima"))


class Clip:
    """A text encoder of Wan: a phrase of three tokens and two of padding."""

    tokenizer = property(lambda self: self)
    pad_token = 0

    def tokenize(self, text, return_word_ids=False):
        return {"umt5xxl": [[(token, 1.0, 1) for token in (5, 6, 1)] + [(0, 1.0, 0)] * 2]}

    def encode_from_tokens_scheduled(self, tokens):
        return [[prompt("wan", 11, 5)[0][0], {}]]


def test_a_phrase_is_seen_in_its_region_alone(models):
    """Text has no order there: one that is seen nowhere is none, to rounding."""
    model, (positive, negative) = models("wan"), both("wan")

    def drawn(mask, **settings):
        inputs = {"clip": Clip(), "positive": positive, "mask": mask, "phrase": "a red fox"} | settings
        patched, text = tiny_models.execute(RegionPhrase, model=model, **inputs)[:2]
        return sample(patched, text, negative, latent("wan", frames=2))

    plain = sample(model, positive, negative, latent("wan", frames=2))
    close(drawn(torch.zeros(1, 96, 64)), plain, 1e-5)
    assert relative(drawn(half()), plain) > 1e-3
    longer = [[torch.cat([positive[0][0], prompt("wan", 11, 5)[0][0][:, :3]], 1), {}]]
    assert torch.equal(drawn(torch.ones(1, 96, 64)), sample(model, longer, negative, latent("wan", frames=2)))
    alone = [[prompt("wan", 11, 5)[0][0][:, :3], {}]]
    inside = drawn(torch.ones(1, 96, 64), prompt_inside=0.0)
    close(inside, sample(model, alone, negative, latent("wan", frames=2)), 1e-5)
    of_frames = torch.cat([half(), torch.zeros(1, 96, 64)])
    assert torch.equal(drawn(of_frames[[0, 0]]), drawn(half()))
    assert torch.equal(drawn(of_frames[[0, 1, 1, 1, 1]]), drawn(of_frames))
    assert relative(drawn(of_frames), drawn(half())) > 1e-3


def test_the_act_stands_on_the_clone_alone(models):
    model, (positive, _) = models("wan"), both("wan")
    options = str(model.model_options)
    patched = apply(model, half(), words_of(positive))
    assert str(model.model_options) == options
    assert not model.get_wrappers(WrappersMP.APPLY_MODEL, joint.JOINT)
    assert patched.get_wrappers(WrappersMP.APPLY_MODEL, joint.JOINT)
