"""Phrase in Region: what is seen where, on transformers and U-Nets, and that nothing of a phrase gets anywhere else."""

from types import SimpleNamespace

import pytest
import tiny_models
import tiny_transformers
import torch
from cross_attention.masked import sample as sample_unet
from palimpsest.nodes.cross_attention import joint
from palimpsest.nodes.cross_attention.nodes import RegionPhrase
from palimpsest.nodes.cross_attention.phrases import wider_square
from tiny_transformers import FAMILIES, latent, prompt, sample

from nodes import StyleModelApply

pytestmark = pytest.mark.usefixtures("inference")

NOWHERE, EVERYWHERE = torch.zeros(1, 96, 64), torch.ones(1, 96, 64)
FOX, OWL = "a red fox", "a white owl"
SEEDS = {FOX: 11, OWL: 12}


@pytest.fixture(scope="module")
def models():
    """A tiny model of a family, made when asked for."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny_models.unet() if family == "sd15" else tiny_transformers.model(family)
        return made[family]

    return get


class Clip:
    """A text encoder whose texts are random, by their seed; of a language model with two tokens of padding, or CLIP."""

    def __init__(self, family, seeds=SEEDS):
        self.family, self.seeds, self.tokenizer = family, seeds, self
        self.name = "l" if family == "sd15" else "qwen3_4b"
        self.pad_token = 7

    def tokenize(self, text, return_word_ids=False):
        return {self.name: [[(token, 1.0, 1) for token in (1, 2, 3)] + [(self.pad_token, 1.0, 0)] * 2]}

    def encode_from_tokens_scheduled(self, tokens):
        return [[text_of(self.family, self.seed, 5)[0][0], {}]]

    def __call__(self, phrase):
        self.seed = self.seeds[phrase]
        return self


def text_of(family, seed, tokens=9):
    return tiny_models.prompt(seed, tokens) if family == "sd15" else prompt(family, seed, tokens)


def draw(family, model, positive, negative):
    return (
        sample_unet(model, positive, negative)
        if family == "sd15"
        else sample(model, positive, negative, latent(family))
    )


def half(white=1.0):
    mask = torch.zeros(1, 96, 64)
    mask[..., :32] = white
    return mask


def add(family, model, positive, mask, phrase=FOX, seeds=SEEDS, **settings):
    inputs = {"clip": Clip(family, seeds)(phrase), "positive": positive, "mask": mask, "phrase": phrase}
    return tiny_models.execute(RegionPhrase, model=model, **inputs, **settings)[:2]


@pytest.mark.parametrize("family", ["sd15", *FAMILIES])
def test_of_a_phrase_nothing_gets_anywhere_else(models, family):
    """Nowhere to be seen, beside another phrase: a third in its place draws the same picture, bit for bit."""
    model, positive, negative = models(family), text_of(family, 1), text_of(family, 2)
    pictures = []
    for seeds in (SEEDS, SEEDS | {OWL: 13}):
        patched, text = add(family, model, positive, half())
        patched, text = add(family, patched, text, NOWHERE, OWL, seeds)
        pictures.append(draw(family, patched, text, negative))
    assert torch.equal(*pictures)


@pytest.mark.parametrize("family", ["sd15", *FAMILIES])
def test_it_is_seen_in_its_region(models, family):
    model, positive, negative = models(family), text_of(family, 1), text_of(family, 2)
    found = {}
    for name, mask in (("nowhere", NOWHERE), ("half", half()), ("everywhere", EVERYWHERE)):
        found[name] = draw(family, *add(family, model, positive, mask), negative)
    plain = [[torch.cat([positive[0][0], text_of(family, 11, 5)[0][0][:, : 5 if family == "sd15" else 3]], 1),
              positive[0][1]]]  # fmt: skip
    assert torch.equal(found["everywhere"], draw(family, model, plain, negative))
    for name in ("nowhere", "everywhere"):
        assert (found["half"] - found[name]).norm() > 1e-4 * found[name].norm()


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_where_text_has_no_order_a_phrase_seen_nowhere_is_no_phrase(models, family):
    model, positive, negative = models(family), text_of(family, 1), text_of(family, 2)
    found, plain = (
        draw(family, *add(family, model, positive, NOWHERE), negative),
        draw(family, model, positive, negative),
    )
    assert (found - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("family", ["sd15", "qwen", "zimage", "flux2", "chroma"])
def test_inside_the_prompt_counts_as_much_as_is_asked(models, family):
    """Nothing of it where the region is everywhere: another prompt of the same length draws the same picture."""
    model, negative = models(family), text_of(family, 2)
    found = {}
    for share in (0.0, 0.5, 1.0):
        found[share] = [
            draw(family, *add(family, model, text_of(family, seed), EVERYWHERE, prompt_inside=share), negative)
            for seed in (1, 3)
        ]
    assert torch.equal(*found[0.0])
    moved = [float((a - b).norm()) for a, b in (found[0.5], found[1.0])]
    assert moved[0] > 0 and abs(moved[0] - moved[1]) > 1e-5


@pytest.mark.parametrize("family", ["flux", "qwen", "lumina2"])
@pytest.mark.parametrize("fox_first", [True, False])
def test_what_a_region_hides_of_the_prompt_other_phrases_and_reference_pictures_see(
    models, family, fox_first, monkeypatch
):
    """The weights of the prompt's nine tokens, for those of text and picture; half of the picture hides all of it."""
    seen, shares = [], joint.shares

    def look(before, after, groups, keys):
        seen.extend(before[:, i] for i, group in enumerate(groups) if 0 in group.tolist())
        return shares(before, after, groups, keys)

    monkeypatch.setattr(joint, "shares", look)
    model, positive, refers = models(family), text_of(family, 1), family != "lumina2"
    reference = torch.randn(latent(family, side=(4, 4)).shape, generator=torch.Generator().manual_seed(5))
    patched, text = model, [[positive[0][0], positive[0][1] | ({"reference_latents": [reference]} if refers else {})]]
    chain = [(half(), FOX, 0.0), (1 - half(), OWL, 1.0)]
    for mask, phrase, share in chain if fox_first else chain[::-1]:
        patched, text = add(family, patched, text, mask, phrase, prompt_inside=share)
    draw(family, patched, text, text_of(family, 2, 15))
    fox, owl = (slice(9, 12), slice(12, 15)) if fox_first else (slice(12, 15), slice(9, 12))
    refined, layers = ([each for each in seen if (len(each) == 15) is alone] for alone in (True, False))
    assert layers and bool(refined) is not refers
    for weights in seen:
        assert bool((weights[:9] == 1).all() and (weights[fox] == 0).all() and (weights[owl] == 1).all())
    for weights in layers:
        picture = weights[15:39].view(6, 4)
        assert bool((picture[:, :2] == 0).all() and (picture[:, 2:] == 1).all() and (weights[39:] == 1).all())


@pytest.mark.parametrize("family", ["sd15", "flux", "qwen"])
def test_the_same_phrase_in_two_regions_is_seen_in_both(models, family):
    """As often as it stands in the text, each in its own region: the third of three, seen nowhere, may be another."""
    model, positive, negative = models(family), text_of(family, 1), text_of(family, 2)
    found = []
    for seeds in (SEEDS | {OWL: SEEDS[FOX]}, SEEDS):
        patched, text = add(family, model, positive, half())
        patched, text = add(family, patched, text, 1 - half())
        found.append(draw(family, *add(family, patched, text, NOWHERE, OWL, seeds), negative))
    assert torch.equal(*found)
    nowhere = draw(family, *add(family, model, positive, NOWHERE), negative)
    assert (found[0] - nowhere).norm() > 1e-3 * nowhere.norm()


def test_a_phrase_equal_to_the_prompt_in_its_place_is_that_prompt(models):
    model, positive, negative = models("flux"), text_of("flux", 11, 5), text_of("flux", 2)
    alone = [[positive[0][0][:, :3], positive[0][1]]]
    patched, text = add("flux", model, alone, EVERYWHERE, prompt_inside=0.0)
    found, plain = draw("flux", patched, text, negative), draw("flux", model, alone, negative)
    assert (found - plain).norm() < 1e-5 * plain.norm()


def test_a_conditioning_that_counts_its_tokens_counts_the_phrase():
    family = "qwen"
    seen = torch.ones(1, 9, dtype=torch.long)
    positive = [[text_of(family, 1)[0][0], {"attention_mask": seen, "other": 1}]]
    _, text = add(family, tiny_transformers.model(family), positive, half())
    assert text[0][0].shape[1] == 9 + 3
    assert text[0][1]["attention_mask"].shape == (1, 12) and text[0][1]["other"] == 1
    assert seen.shape == (1, 9) and positive[0][0].shape[1] == 9


def test_a_square_mask_grows_behind_its_text():
    mask = torch.tensor([[[0.0, 1, 2], [3, 4, 5], [6, 7, 8]]])
    wanted = [[0.0, 1, 0, 2], [3, 4, 0, 5], [0, 1, 0, 2], [6, 7, 0, 8]]
    assert wider_square(mask, 2, 1).tolist() == [wanted]
    assert wider_square(mask < 4, 2, 1).tolist() == [
        [[True, True, True, True], [True, False, True, False], [True, True, True, True], [False, False, True, False]]
    ]


def test_a_style_with_a_bias_before_the_phrase_is_one_behind_it(models):
    """FLUX has no order of text: where the phrase is seen everywhere it is a part of the prompt."""
    model, negative = models("flux"), text_of("flux", 2)
    style = SimpleNamespace(get_cond=lambda picture: torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(9)))

    def styled(positive):
        return StyleModelApply().apply_stylemodel(positive, style, None, 0.3, "attn_bias")[0]

    patched, text = add("flux", model, styled(text_of("flux", 1)), EVERYWHERE)
    ((tensor, extra),) = text_of("flux", 1)
    whole = styled([[torch.cat([tensor, text_of("flux", 11, 5)[0][0][:, :3]], 1), extra]])
    found, wanted = draw("flux", patched, text, negative), draw("flux", model, whole, negative)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_the_model_and_the_prompt_stay_as_they_were(models):
    model, positive, negative = models("flux"), text_of("flux", 1), text_of("flux", 2)
    plain, options, text = draw("flux", model, positive, negative), str(model.model_options), positive[0][0].clone()
    draw("flux", *add("flux", model, positive, half()), negative)
    assert str(model.model_options) == options and torch.equal(positive[0][0], text)
    assert torch.equal(draw("flux", model, positive, negative), plain)


def test_what_cannot_be_is_refused(models):
    model, positive = models("flux"), text_of("flux", 1)
    with pytest.raises(ValueError, match="phrase is empty: write what the region shows"):
        add("flux", model, positive, half(), " ", {" ": 1})
    with pytest.raises(ValueError, match="positive has 48 channels, the phrase 24: connect the clip"):
        add("sd15", model, positive, half())
    with pytest.raises(ValueError, match="clip is empty"):
        tiny_models.execute(RegionPhrase, model=model, clip=None, positive=positive, mask=half(), phrase=FOX)
    patched, _ = add("flux", model, positive, half())
    with pytest.raises(ValueError, match=r"'a red fox' of Phrase in Region .*positive output of Phrase in Region"):
        draw("flux", patched, positive, text_of("flux", 2))
