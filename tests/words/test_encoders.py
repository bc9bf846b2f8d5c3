"""Select Words with text encoders of transformers: the host's own tokenizers around small random language models."""

import io

import comfy.sd
import pytest
import sentencepiece
import tiny_models
import torch
from comfy.text_encoders import anima, flux, pixart_t5, qwen_image, sd3_clip, wan, z_image
from palimpsest.nodes.words import read_words, without_padding
from palimpsest.nodes.words.nodes import SelectWords

import nodes

LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 28, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
SMALL_T5 = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_heads": 2, "num_layers": 1}
SMALL_CLIP = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SIZES = {
    **{f"{name}_model_config": LANGUAGE for name in ("qwen3_4b", "qwen25_7b")},
    **{f"clip_{name}_model_config": SMALL_CLIP for name in "lg"},
    "t5xxl_model_config": SMALL_T5,
}
FAMILIES = {
    "flux": (flux.flux_clip(), flux.FluxTokenizer),
    "chroma": (pixart_t5.pixart_te(), pixart_t5.PixArtTokenizer),
    "klein": (flux.klein_te(), flux.KleinTokenizer),
    "zimage": (z_image.te(), z_image.ZImageTokenizer),
    "qwen": (qwen_image.te(), qwen_image.QwenImageTokenizer),
    "sd3 without t5": (sd3_clip.sd3_clip(t5=False), sd3_clip.SD3Tokenizer),
    "sd3 without clip": (sd3_clip.sd3_clip(clip_l=False, clip_g=False), sd3_clip.SD3Tokenizer),
}
pytestmark = pytest.mark.usefixtures("inference")


def small_vocabulary():
    """A sentence piece model of umT5's kind, trained on a few words: the host reads it from a checkpoint."""
    text = "a red cat in the snow sleeps cat, asleep haired girl man of 1990 nosed dog 2 palimpsest"
    words = text.split(" ")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words[:i]) for i in range(len(words))] * 3), model_writer=made,
        vocab_size=48, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return torch.frombuffer(bytearray(made.getvalue()), dtype=torch.uint8)


class Target:
    """What the host's CLIP asks of a text encoder's family."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


@pytest.fixture(scope="module")
def clips():
    """The host's CLIP of a family with small random text encoders, made when asked for."""
    made = {}

    def get(family):
        if family not in made:
            torch.manual_seed(0)
            with torch.inference_mode():
                made[family] = comfy.sd.CLIP(Target(*FAMILIES[family]), model_options=dict(SIZES))
                tiny_models.fill(made[family].cond_stage_model)
                for name, weight in made[family].cond_stage_model.named_parameters():
                    if "t5xxl" in name and ("SelfAttention.o." in name or ".wo." in name):
                        weight.zero_()  # T5 looks both ways: without its layers a row is its own token alone
        return made[family]

    return get


def select(clip, text, words):
    """(ChosenWords, CONDITIONING, report)."""
    return tiny_models.execute(SelectWords, clip=clip, text=text, words=words)


def places(clip, text, words):
    chosen = select(clip, text, words)[0]
    return dict(zip(chosen.words, chosen.positions, strict=True))


def first_difference(clip, text, other):
    """The first row in which two prompts are encoded differently: nothing is passed backwards.

    Prompts of two lengths are rounded differently on some processors, by far less than a word changes.
    """
    a, b = (nodes.CLIPTextEncode().encode(clip, each)[0][0][0] for each in (text, other))
    rows = min(a.shape[1], b.shape[1])
    return ((a[:, :rows] - b[:, :rows]).abs() > 1e-4 * a.abs().amax()).any(-1)[0].nonzero()[0].item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "word", "other"),
    [
        ("a red cat in the snow", "cat", "dog"),
        ("A red cat, in the snow", "Cat", "dog"),
        ("cat", "cat", "dog"),
        ("the red\ncat, asleep (in the snow)", "cat", "dog"),
        ("a red-haired girl", "haired", "nosed"),
        ("a man of 1990 in the snow", "1990", "2"),
    ],
    ids=range(6),
)
def test_a_word_is_found_where_exchanging_it_changes_the_prompt(clips, family, text, word, other):
    clip = clips(family)
    changed = text.replace(word.lower(), other)
    found = next(iter(places(clip, text, word).values()))
    assert min(found) == first_difference(clip, text, changed)
    assert max(found) < select(clip, text, word)[0].prompt.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_conditioning_is_the_hosts_own(clips, family):
    text = "a red cat, in the snow"
    chosen, positive, report = select(clips(family), text, "cat, red")
    usual = nodes.CLIPTextEncode().encode(clips(family), text)[0]
    assert torch.equal(positive[0][0], usual[0][0]) and torch.equal(chosen.prompt, usual[0][0])
    assert "a [red] [cat] , in the snow" in report or "a [red] [cat]  in the snow" in report


def test_of_a_chat_template_nothing_is_chosen(clips):
    """It holds words too: user, assistant, and in Qwen-Image a whole sentence that the host cuts off again."""
    for family, word in (("klein", "user"), ("zimage", "assistant"), ("qwen", "system"), ("qwen", "image")):
        with pytest.raises(ValueError, match=f"'{word}' is not in the prompt. Its words are: red, cat"):
            select(clips(family), "red cat", word)
    assert list(places(clips("qwen"), "the user and his image", "*")) == ["user", "image"]
    assert places(clips("zimage"), "a user", "user")["user"] == (4,)
    rows = places(clips("qwen"), "cat", "cat")["cat"]
    assert rows == (0,)  # <|im_start|>user and the line's end are cut off with what is before


def test_words_of_several_pieces_numbers_and_signs(clips):
    text = "A palimpsest's caf\u00e9, t-shirt; 1990: snow\u2603 and caf\u00e9s"
    for family in ("flux", "zimage"):
        words = {word.text: word for word in next(iter(read_words(clips(family), text).values()))}
        assert {"A", "palimpsest", "caf\u00e9", "t", "shirt", "1990", "and"} <= set(words)
        assert len(words["palimpsest"].positions) > 1
        found = places(clips(family), text, "palimpsest's, t-shirt, 1990, *")
        assert "A" not in found and "and" not in found
        assert found["t-shirt"] == tuple(range(found["t-shirt"][0], found["t-shirt"][-1] + 1))


def test_languages_without_spaces_are_read_token_by_token(clips):
    text = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"  # one red cat
    found = places(clips("zimage"), text, "\u732b, \u7ea2\u8272")
    assert [len(rows) for rows in found.values()] == [1, 1]
    assert found["\u732b"][0] == found["\u7ea2\u8272"][0] + 2
    with pytest.raises(ValueError, match="is not in the prompt"):  # T5 knows none of these signs
        places(clips("flux"), text, "\u732b")


def test_cyrillic_letters_cut_in_half_stay_in_their_word(clips):
    text = "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u043e\u0442 \u0441\u043f\u0438\u0442"
    words = read_words(clips("zimage"), text)["qwen3_4b"]
    assert [word.text for word in words] == text.split()


class WholeSD3:
    """The tokenizers of SD 3, and the shape of what its three text encoders give; T5 alone would be 260 MB."""

    class cond_stage_model:
        clip_l = clip_g = t5xxl = object()

    def __init__(self):
        self.tokenizer = sd3_clip.SD3Tokenizer()
        self.tokenize = self.tokenizer.tokenize_with_weights

    def encode_from_tokens_scheduled(self, tokens):
        rows = min(sum(map(len, tokens[name])) for name in "lg") + sum(map(len, tokens["t5xxl"]))
        return [[torch.zeros(1, rows, 4096), {}]]


def test_sd_3_has_a_word_twice(clips):
    """Once among the tokens of both CLIPs, once among those of T5 behind them, where an a is a space and a letter."""
    assert places(WholeSD3(), "a Red cat", "cat, red") == {"cat": (3, 77 + 3), "red": (2, 77 + 2)}
    assert places(WholeSD3(), "a Red cat", "*") == {"red": (2, 77 + 2), "cat": (3, 77 + 3)}
    assert places(WholeSD3(), "one " * 80 + "cat", "cat")["cat"] == (83, 154 + 80)
    assert places(clips("sd3 without t5"), "a red cat", "cat")["cat"] == (3,)
    assert places(clips("sd3 without clip"), "a red cat", "cat")["cat"] == (3,)


def test_weights_are_read_where_the_host_reads_them(clips):
    assert places(clips("flux"), "a (red:1.3) cat", "red") == {"red": (2,)}  # behind a and a space of its own
    found = places(clips("zimage"), "a (red:1.3) cat", "red, 1.3")  # there brackets are letters as others
    assert list(found) == ["red", "1.3"]


class Tokens:
    """The tokenizers of a text encoder, and the shape of what it gives; the encoders have sizes that files fix."""

    class cond_stage_model:
        pass

    def __init__(self, tokenizer, rows_of, width):
        self.tokenizer, self.rows_of, self.width = tokenizer, rows_of, width
        self.tokenize = tokenizer.tokenize_with_weights

    def encode_from_tokens_scheduled(self, tokens):
        rows = sum(map(len, tokens[self.rows_of]))
        return [[torch.zeros(1, rows, self.width), {}]]


def test_words_of_wan_are_pieces_of_umt5_without_its_padding():
    clip = Tokens(wan.WanT5Tokenizer(tokenizer_data={"spiece_model": small_vocabulary()}), "umt5xxl", 4096)
    text = "a red (cat:1.2) in the snow, asleep"
    tokens = clip.tokenize(text)["umt5xxl"][0]
    assert len(tokens) == 512
    vocabulary = clip.tokenizer.clip_umt5xxl.inv_vocab
    found = places(clip, text, "cat, snow, *")
    assert set(found) == {"cat", "snow", "red", "asleep"}
    for word, rows in found.items():
        assert "".join(vocabulary[tokens[row][0]] for row in rows).strip("\u2581,") == word
        assert all(tokens[row][1] == (1.2 if word == "cat" else 1.0) for row in rows)
    assert without_padding(clip, text, 512) == sum(token[0] != 0 for token in tokens)
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        places(clip, text, "dog")


def test_words_of_anima_are_tokens_of_t5_which_the_network_makes_its_text_of():
    """Their rows may lie behind the last one of what its own text encoder gave."""
    clip = Tokens(anima.AnimaTokenizer(), "qwen3_06b", 1024)
    text = "a palimpsest's red (cat:1.3) in the snow"
    tokens = clip.tokenize(text)
    chosen, conditioning, report = select(clip, text, "cat, snow, palimpsest")
    pieces = clip.tokenizer.t5xxl.inv_vocab
    for word, rows in zip(chosen.words, chosen.positions, strict=True):
        assert "".join(pieces[tokens["t5xxl"][0][row][0]] for row in rows).strip("\u2581") == word
    assert chosen.length == len(tokens["t5xxl"][0]) > conditioning[0][0].shape[1]
    assert f"{chosen.length} tokens in all" in report
    chosen.require_sound()
