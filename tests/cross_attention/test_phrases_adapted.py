"""Phrase in Region on Anima, whose network makes another text of what its text encoder gave: of each phrase alone."""

import itertools
import math

import pytest
import tiny_models
import torch
from cross_attention.hidden_words import TEXT, close, half, relative
from palimpsest.kernels.cross_attention_mask import masked as masked_attention
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask, RegionPhrase
from palimpsest.nodes.words import ChosenWords
from tiny_transformers import latent, prompt, sample

import nodes

FOX, OWL, PROMPT = "a red fox", "a white owl", "the prompt"
SEEDS = {FOX: 11, OWL: 12, PROMPT: 1}
TOKENS = {FOX: 5, OWL: 7, PROMPT: 12}  # of T5; the encoder gives another number of rows
NOWHERE, EVERYWHERE = torch.zeros(1, 96, 64), torch.ones(1, 96, 64)
PADDED = 512  # rows of the text that the network makes

pytestmark = pytest.mark.usefixtures("inference")


def read(phrase, seeds=SEEDS):
    """A CONDITIONING as Anima's text encoder gives it: rows of one tokenizer, and the other one's tokens."""
    seed, length = seeds[phrase], TOKENS[phrase]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 32000, (length,), generator=generator, dtype=torch.int)
    weights = 1 + torch.arange(length) / length
    return prompt("anima", seed, TEXT - length % 4, t5xxl_ids=ids, t5xxl_weights=weights)


NEGATIVE = prompt("anima", 2, 4, t5xxl_ids=torch.arange(2, 8, dtype=torch.int), t5xxl_weights=torch.ones(6))


class Clip:
    """Anima's text encoder."""

    def __init__(self, seeds=SEEDS):
        self.seeds = seeds

    def tokenize(self, text, return_word_ids=False):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return read(tokens, self.seeds)


def add(model, positive, mask, phrase=FOX, seeds=SEEDS, **settings):
    inputs = {"clip": Clip(seeds), "positive": positive, "mask": mask, "phrase": phrase}
    return tiny_models.execute(RegionPhrase, model=model, **inputs, **settings)[:2]


def draw(model, positive, negative=NEGATIVE, **settings):
    return sample(model, positive, negative, latent("anima"), **settings)


def made(model, positive):
    """The text that the network makes of a prompt, as the host gives it to the network."""
    text, extra = positive[0]
    asked = {name: extra[name] for name in ("t5xxl_ids", "t5xxl_weights")}
    found = model.model.extra_conds(cross_attn=text, device=torch.device("cpu"), **asked)
    assert list(found) == ["c_crossattn"] and found["c_crossattn"].cond.shape[1] == PADDED
    return found["c_crossattn"].cond


def as_text(*texts):
    """A CONDITIONING of text that needs no adapting."""
    return [[torch.cat(texts, 1), {}]]


def by_matrix(model, places, inside=1.0):
    """A clone whose attention to text is a matrix written out: the phrase's rows by places (N,), the prompt's as rest.

    inside: how much of its weight the prompt keeps in the phrase's places.
    """
    turn = itertools.count()

    def attend(function, q, k, v, heads, mask=None, skip_reshape=False, **named):
        if not skip_reshape:
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
        before = torch.ones(len(q), 1, *scores.shape[2:], dtype=torch.float64)
        if next(turn) % 2 and k.shape[2] == 2 * PADDED:
            before[..., PADDED:] *= places[:, None]
            before[..., :PADDED] *= 1 - (1 - inside) * places[:, None]
        return (
            (masked_attention(scores, before, torch.ones_like(before)) @ v.double()).float().transpose(1, 2).flatten(2)
        )

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = attend
    return patched


def places():
    return torch.nn.functional.adaptive_avg_pool2d(half()[:, None], (6, 4)).flatten()


@pytest.mark.parametrize("inside", [1.0, 0.5, 0.0])
def test_a_phrase_is_seen_in_its_region_as_the_written_out_matrix_has_it(models, inside):
    """The phrase's rows are what the host makes of it alone, behind what it makes of the prompt."""
    model, positive = models("anima"), read(PROMPT)
    plain = draw(model, positive)
    found = draw(*add(model, positive, half(), prompt_inside=inside))
    whole = as_text(made(model, positive), made(model, read(FOX)))
    close(found, draw(by_matrix(model, places(), inside), whole), 2e-5)
    assert relative(found, plain) > 1e-3
    assert torch.equal(draw(model, positive), plain)


def test_everywhere_it_is_the_text_behind_the_prompt_bit_for_bit(models):
    model, positive = models("anima"), read(PROMPT)
    whole = as_text(made(model, positive), made(model, read(FOX)))
    assert torch.equal(draw(*add(model, positive, EVERYWHERE)), draw(model, whole))
    outside_of_the_span = add(model, positive, NOWHERE, start_percent=0.97, end_percent=0.98)
    assert torch.equal(draw(*outside_of_the_span), draw(model, whole))


def test_nowhere_it_is_none_and_in_place_of_the_prompt_it_is_that_prompt(models):
    """Text has no order there, and each brings its own padding."""
    model, positive = models("anima"), read(PROMPT)
    close(draw(*add(model, positive, NOWHERE)), draw(model, positive), 1e-5)
    close(draw(*add(model, positive, EVERYWHERE, prompt_inside=0.0)), draw(model, read(FOX)), 1e-5)


@pytest.mark.parametrize("inside", [1.0, 0.5, 0.0])
def test_a_phrase_equal_to_the_prompt_is_the_plain_prompt(models, inside):
    model, positive = models("anima"), read(PROMPT)
    for mask in (EVERYWHERE, half()):
        close(draw(*add(model, positive, mask, PROMPT, prompt_inside=inside)), draw(model, positive), 1e-5)


def test_outside_of_its_region_a_phrase_changes_nothing_in_one_block(models):
    """What the first block's attention to text gives there is the plain prompt's."""
    model, positive, seen = models("anima"), read(PROMPT), {}
    cross = model.model.diffusion_model.blocks[0].cross_attn
    for name, given in (("plain", (model, positive)), ("phrase", add(model, positive, half()))):
        found = seen.setdefault(name, [])
        hook = cross.register_forward_hook(lambda _, args, out, found=found: found.append(out.clone()))
        try:
            draw(*given, cfg=1.0, steps=1)
        finally:
            hook.remove()
    plain, phrase = (torch.cat(seen[name]).reshape(-1, 24, 128) for name in ("plain", "phrase"))
    outside = places() == 0
    close(phrase[:, outside], plain[:, outside], 1e-6)
    assert relative(phrase[:, ~outside], plain[:, ~outside]) > 1e-3


def test_of_a_phrase_nothing_gets_anywhere_else(models):
    """Nowhere to be seen, beside another phrase: a third in its place draws the same picture, bit for bit."""
    model, positive, pictures = models("anima"), read(PROMPT), []
    for seeds in (SEEDS, SEEDS | {OWL: 13}):
        patched, text = add(model, positive, half())
        pictures.append(draw(*add(patched, text, NOWHERE, OWL, seeds)))
    assert torch.equal(*pictures)
    assert torch.equal(text[0][0], positive[0][0]) and text[0][1].keys() - positive[0][1].keys() == {
        "palimpsest_phrases"
    }


def test_words_of_the_prompt_are_still_found_in_front_of_a_phrase(models):
    model, positive = models("anima"), read(PROMPT)
    words = ChosenWords(("word",), ((3, 10),), positive[0][0], length=TOKENS[PROMPT])
    patched, text = add(model, positive, half())
    mode = "after softmax, renormalised"
    masked = tiny_models.execute(CrossAttentionMask, model=patched, mask=half(), tokens=words, mode=mode)[0]
    assert relative(draw(masked, text), draw(patched, text)) > 1e-4


def test_an_area_beside_it_has_the_text_of_the_prompt_that_the_host_copies(models):
    """The host copies the prompt of the whole picture into the area, with what stands beside the area's prompt."""
    model = models("anima")
    patched, text = add(model, read(PROMPT), half())
    inputs = {"conditioning": text, "x": 0, "y": 0, "width": 32, "height": 96, "strength": 1.0}
    limited = tiny_models.execute(nodes.ConditioningSetArea, **inputs)[0]
    whole = as_text(made(model, read(PROMPT)), made(model, read(FOX)))
    limited_text = tiny_models.execute(nodes.ConditioningSetArea, **inputs | {"conditioning": whole})[0]
    white = add(model, read(PROMPT), EVERYWHERE)
    both = [*tiny_models.execute(nodes.ConditioningSetArea, **inputs | {"conditioning": white[1]})[0], *read(OWL)]
    assert torch.equal(draw(white[0], both), draw(model, [*limited_text, *read(OWL)]))
    assert torch.isfinite(draw(patched, [*limited, *read(OWL)])).all()


def test_outside_of_inference_the_network_is_given_the_same_text():
    """There the host leaves the adapting to the network, which sees one text: the phrase is adapted before."""
    import tiny_transformers

    with torch.inference_mode(False), torch.no_grad():
        model = tiny_transformers.model("anima", inference=False)
        positive = [[read(PROMPT)[0][0].clone(), {k: v.clone() for k, v in read(PROMPT)[0][1].items()}]]
        negative = [[NEGATIVE[0][0].clone(), {k: v.clone() for k, v in NEGATIVE[0][1].items()}]]
        found = draw(*add(model, positive, half()), negative)
    with torch.inference_mode():
        wanted = draw(*add(model, read(PROMPT), half()))
    close(found, wanted, 1e-6)


def test_what_cannot_be_is_refused(models):
    model, positive = models("anima"), read(PROMPT)
    patched, text = add(model, positive, half())
    with pytest.raises(ValueError, match=r"'a red fox' of Phrase in Region .*positive output of Phrase in Region"):
        draw(patched, positive)

    class Other(Clip):
        def encode_from_tokens_scheduled(self, tokens):
            return prompt("anima", 3, 5)

    with pytest.raises(ValueError, match="this clip gives the phrase none: connect the clip that encoded the prompt"):
        tiny_models.execute(RegionPhrase, model=model, clip=Other(), positive=positive, mask=half(), phrase=FOX)
    inputs = {"clip": Clip(), "positive": text, "mask": half(), "phrase": OWL}
    told = RegionPhrase.execute(model, **inputs).ui
    told = told["text"][0] if isinstance(told, dict) else told.as_dict()["text"][0]
    assert f"{12 + 5 + 7} tokens in all" in told


def test_the_hosts_own_text_encoder_gives_all_that_a_phrase_needs(models):
    """Its tokenizers around a small random language model."""
    import comfy.sd
    from comfy.text_encoders import anima

    class Target:
        clip, tokenizer, params = anima.te(), anima.AnimaTokenizer, {}

    small = {
        "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }  # fmt: skip
    clip = comfy.sd.CLIP(Target, model_options={"qwen3_06b_model_config": small})
    tiny_models.fill(clip.cond_stage_model)
    model, positive = models("anima"), nodes.CLIPTextEncode().encode(clip, "a meadow (in the snow:1.3)")[0]
    inputs = {"clip": clip, "positive": positive, "mask": EVERYWHERE, "phrase": "a red fox, asleep"}
    patched, text = tiny_models.execute(RegionPhrase, model=model, **inputs)[:2]
    alone = nodes.CLIPTextEncode().encode(clip, "a red fox, asleep")[0]
    whole = as_text(made(model, positive), made(model, alone))
    assert torch.equal(draw(patched, text), draw(model, whole))
