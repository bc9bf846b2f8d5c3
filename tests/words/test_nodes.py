"""Select Words: the host's own tokenizers, around small text encoders, tell which rows of a prompt its words are."""

import comfy.hooks
import comfy.sd
import pytest
import tiny_models
import torch
from comfy import sd1_clip, sdxl_clip
from comfy.text_encoders import sd2_clip
from comfy_extras.nodes_hooks import CreateHookKeyframesInterpolated, SetClipHooks
from palimpsest.nodes.words import read_words
from palimpsest.nodes.words.choosing import STOP_WORDS
from palimpsest.nodes.words.nodes import SelectWords
from safetensors.torch import save_file

import nodes

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES = {
    "sd1": (sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer),
    "sd2": (sd2_clip.SD2ClipModel, sd2_clip.SD2Tokenizer),
    "sdxl": (sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer),
    "refiner": (sdxl_clip.SDXLRefinerClipModel, sdxl_clip.SDXLTokenizer),
}

pytestmark = pytest.mark.usefixtures("inference")


class Target:
    """What the host's CLIP asks of a text encoder's family."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """A folder with an embedding of three vectors for both encoders, and one whose lengths differ."""
    folder = tmp_path_factory.mktemp("embeddings")
    generator = torch.Generator().manual_seed(0)

    def vectors(rows, columns):
        return torch.randn(rows, columns, generator=generator)

    save_file({"clip_l": vectors(3, 24), "clip_g": vectors(3, 24)}, folder / "paint.safetensors")
    save_file({"clip_l": vectors(9, 24), "clip_g": vectors(9, 24)}, folder / "Long(v2).safetensors")
    save_file({"clip_l": vectors(2, 24), "clip_g": vectors(1, 24)}, folder / "uneven.safetensors")
    return str(folder)


def build(family, folder):
    """The host's CLIP of a family with a small random text model; embeddings are read as the host reads them."""
    options = {f"clip_{name}_model_config": SMALL for name in "lgh"}
    clip_class, tokenizer = FAMILIES[family]
    torch.manual_seed(0)
    with torch.inference_mode():
        clip = comfy.sd.CLIP(Target(clip_class, tokenizer), embedding_directory=folder, model_options=dict(options))
        tiny_models.fill(clip.cond_stage_model)
    return clip


@pytest.fixture(scope="module")
def clips(embeddings):
    """A CLIP by family, made when asked for."""
    made = {}

    def get(family="sd1"):
        if family not in made:
            made[family] = build(family, embeddings)
        return made[family]

    return get


def select(clip, text, words):
    """(ChosenWords, CONDITIONING, report)."""
    return tiny_models.execute(SelectWords, clip=clip, text=text, words=words)


def places(clip, text, words):
    """The positions of every entry, by entry."""
    chosen = select(clip, text, words)[0]
    return dict(zip(chosen.words, chosen.positions, strict=True))


def first_difference(clip, text, other):
    """The first row in which two prompts are encoded differently: causal text models pass nothing backwards."""
    a, b = (nodes.CLIPTextEncode().encode(clip, each)[0][0][0] for each in (text, other))
    return (a != b).any(-1)[0].nonzero()[0].item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "word", "other"),
    [
        ("a red cat in the snow", "cat", "dog"),
        ("A red CAT, in the snow", "cat", "DOG"),
        ("a (red:1.3) (cat:0.7) in the snow", "cat", "dog"),
        ("a ((red)) [(cat)] in the snow", "cat", "dog"),
        (r"a \(red\) cat \(sleeping\) in the snow", "cat", "dog"),
        ("embedding:paint a red cat", "cat", "dog"),
        ("a (embedding:paint:1.2), red cat", "cat", "dog"),
        ("a red\ncat BREAK in the snow", "cat", "dog"),
        ("one, " * 60 + "cat", "cat", "dog"),
        ("one " * 74 + "cat", "cat", "dog"),
        ("one " * 75 + "cat", "cat", "dog"),
        ("(one two three four five six seven:1.1) " * 25 + "cat", "cat", "dog"),
    ],
    ids=range(12),
)
def test_a_word_is_found_where_exchanging_it_changes_the_prompt(clips, family, text, word, other):
    clip = clips(family)
    changed = text.replace("CAT", "DOG").replace("cat", other)
    assert places(clip, text, word)[word] == (first_difference(clip, text, changed),)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_vector_of_an_embedding_belongs_to_it(clips, family):
    clip = clips(family)
    asked = "paint, embedding:paint, EMBEDDING:Paint, cat, red *, red embedding:paint"
    found = places(clip, "a red embedding:paint, cat", asked)
    first = first_difference(clip, "a red embedding:paint, cat", "a red one two three, cat")
    vectors = tuple(range(first, first + 3))
    assert found["paint"] == found["embedding:paint"] == found["EMBEDDING:Paint"] == vectors
    assert found["cat"] == (first + 4,)  # a comma lies between
    assert found["red *"] == found["red embedding:paint"] == (first - 1, *vectors)


def test_an_embedding_that_is_not_there_is_no_word(clips):
    assert places(clips(), "a embedding:missing cat", "cat") == {"cat": (2,)}
    with pytest.raises(ValueError, match="'missing' is not in the prompt"):
        select(clips(), "a embedding:missing cat", "missing")


def test_two_embeddings_keep_their_names(clips):
    found = places(clips(), "embedding:paint embedding:uneven embedding:paint cat", "uneven, paint, paint#2, cat, *")
    assert found["paint"] == (1, 2, 3, 6, 7, 8)
    assert found["paint#2"] == (6, 7, 8)
    assert found["uneven"] == (4, 5)
    assert found["cat"] == (9,)
    assert found["embedding:paint"] == found["paint"]  # from *


def test_embeddings_that_move_the_two_encoders_of_sdxl_apart_are_refused(clips):
    assert places(clips("sdxl"), "a cat and embedding:uneven", "cat") == {"cat": (2,)}
    with pytest.raises(ValueError, match="two text encoders of this model read 'cat' at different places"):
        select(clips("sdxl"), "embedding:uneven a cat", "cat")


def test_embeddings_of_another_text_encoder_are_refused(clips, embeddings):
    save_file({"clip_l": torch.randn(2, 40)}, f"{embeddings}/foreign.safetensors")
    with pytest.raises(ValueError, match="has 40 channels and is made for another text encoder"):
        select(clips(), "a embedding:foreign cat", "cat")


def test_pieces_phrases_capitals_and_punctuation(clips):
    text = "A t-shirt: the palimpsest's COLOUR, bright red. 1990s caf\u00e9 long_hair (red)"
    found = places(clips(), text, "Palimpsest, t-shirt, bright RED!, 1990, caf\u00e9, long_hair, Palimpsest's, red")
    words = {word.text: word for word in read_words(clips(), text)["l"]}
    assert found["Palimpsest"] == words["palimpsest"].positions
    assert len(found["Palimpsest"]) > 1
    assert found["t-shirt"] == (2, 3, 4)
    assert found["bright RED!"] == (*words["bright"].positions, words["bright"].positions[0] + 1)
    assert len(found["1990"]) == 4
    assert found["caf\u00e9"] == words["caf\u00e9"].positions
    assert found["long_hair"] == tuple(range(words["long"].positions[0], words["hair"].positions[0] + 1))
    assert found["Palimpsest's"] == words["palimpsest"].positions + words["'s"].positions
    assert len(found["red"]) == 2


def test_occurrences_are_counted_from_one(clips):
    text = "a cat and a cat and a red cat"
    assert places(clips(), text, "cat, cat#1, cat #3, a *#2") == {
        "cat": (2, 5, 9),
        "cat#1": (2,),
        "cat #3": (9,),
        "a *#2": (4, 5),
    }
    for asked in ("cat#4", "cat#0"):
        with pytest.raises(ValueError, match=rf"'{asked}' asks for occurrence \d, but 'cat' is in the prompt 3 times"):
            select(clips(), text, asked)


def test_an_asterisk_stands_for_letters_or_for_a_word(clips):
    text = "a painted cat, painting the red fence"
    found = places(clips(), text, "paint*, *ing, p*d, red *, * cat, paint* cat")
    assert found == {
        "paint*": (2, 5),
        "*ing": (5,),
        "p*d": (2,),
        "red *": (7, 8),
        "* cat": (2, 3),
        "paint* cat": (2, 3),
    }


def test_a_lone_asterisk_is_every_content_word(clips):
    found = places(clips(), "a red cat, on the snow; the cat's embedding:paint", "*")
    assert list(found) == ["red", "cat", "snow", "embedding:paint"]
    assert found["cat"] == (3, 10)
    assert {"the", "of", "with"} <= STOP_WORDS
    assert list(places(clips(), "a red cat", "cat#1, *")) == ["cat#1", "red", "cat"]


def test_a_word_that_is_not_there_is_refused_with_those_that_are(clips):
    with pytest.raises(ValueError, match=r"'dog' is not in the prompt. Its words are: a, red, cat, paint\."):
        select(clips(), "a red cat, cat (paint)", "dog")
    with pytest.raises(ValueError, match="'cat red' is not in the prompt"):
        select(clips(), "a red cat", "cat red")
    for asked in ("", " , ,", ",\n"):
        with pytest.raises(ValueError, match="chooses nothing"):
            select(clips(), "a red cat", asked)
    for asked in ("!", "...", "#2"):
        with pytest.raises(ValueError, match="is not in the prompt"):
            select(clips(), "a red cat!", asked)
    with pytest.raises(ValueError, match="The prompt has no words"):
        select(clips(), "...", "cat")
    with pytest.raises(ValueError, match="The prompt has no words"):
        select(clips(), "", "*")


def test_a_word_cut_by_the_end_of_a_chunk_keeps_all_its_pieces(clips):
    clip = clips()
    pieces = len(places(clip, "palimpsest", "palimpsest")["palimpsest"])
    text = "one " * (76 - pieces) + "palimpsest cat"  # one piece does not fit
    found = places(clip, text, "palimpsest, cat")
    assert found["palimpsest"][-1] == 78  # 76 ends the first chunk, 77 begins the second
    assert len(found["palimpsest"]) == pieces
    assert found["cat"] == (79,)
    assert len(select(clip, text, "cat")[0].prompt[0]) == 154


def test_the_conditioning_is_the_hosts_own(clips):
    text = "a (red:1.3) cat, embedding:paint in the snow"
    for family in FAMILIES:
        for clip in (clips(family), nodes.CLIPSetLastLayer().set_last_layer(clips(family), -2)[0]):
            chosen, positive, _ = select(clip, text, "cat")
            usual = nodes.CLIPTextEncode().encode(clip, text)[0]
            assert len(positive) == len(usual) == 1
            assert torch.equal(positive[0][0], usual[0][0])
            assert torch.equal(chosen.prompt, usual[0][0])
            assert torch.equal(positive[0][1]["pooled_output"], usual[0][1]["pooled_output"])


def test_a_schedule_on_the_text_encoder_gives_a_variant_for_each_of_its_parts(clips):
    clip = clips().clone()
    key = next(name for name in clip.patcher.model_state_dict() if name.endswith("layers.0.mlp.fc1.weight"))
    weight = clip.patcher.model_state_dict()[key]
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_clip=1.0)
    hook.weights_clip, hook.need_weight_init = {key: ("diff", (torch.randn_like(weight),))}, False
    hooks.add(hook)
    frames = tiny_models.execute(
        CreateHookKeyframesInterpolated, strength_start=0.0, strength_end=1.0, interpolation="linear",
        start_percent=0.0, end_percent=1.0, keyframes_count=3, print_keyframes=False,
    )[0]  # fmt: skip
    hooks.set_keyframes_on_hooks(frames)
    (clip,) = tiny_models.execute(SetClipHooks, clip=clip, apply_to_conds=True, schedule_clip=True, hooks=hooks)
    chosen, positive, _ = select(clip, "a red cat", "cat")
    assert len(positive) == 2
    assert len(chosen.variants) == 1
    assert not torch.equal(chosen.variants[0], chosen.prompt)
    assert all(chosen.offset(tensor) == 0 for tensor, _ in positive)


class OtherTokens:
    """A text encoder that reads a prompt by other names than CLIP's."""

    def __init__(self, *names):
        self.names = names

    def tokenize(self, text, return_word_ids=False):
        return {name: [[(0, 1.0, 1)]] for name in self.names}


@pytest.mark.parametrize("names", [("l", "llama"), ("umt5base",), ("l", "g", "t5xxl", "llama")])
def test_other_text_encoders_are_refused_by_name(names):
    with pytest.raises(
        ValueError, match=f"reads the prompt with .*{sorted(names)[-1]}.*SD 1.x, SD 2.x, SDXL, SD 3, FLUX"
    ):
        select(OtherTokens(*names), "a cat", "cat")


def test_a_checkpoint_without_text_encoder_is_refused():
    with pytest.raises(ValueError, match="clip is empty"):
        select(None, "a cat", "cat")


def test_the_report_marks_the_chosen_pieces(clips):
    _, _, report = select(clips(), "a red palimpsest, embedding:paint BREAK", "red, palimpsest")
    shown, tokens, total, note = report.split("\n")
    assert shown.startswith("a [red] [pa")
    assert "+" in shown.split("[")[2]
    assert shown.endswith("] , embedding:paint x3 break")
    assert tokens.startswith("tokens of red: 2; palimpsest: 3, 4")
    assert total == "77 tokens in all, start and end included"
    assert note.startswith("BREAK is read as the word break")


def test_start_end_and_padding_are_no_words(clips):
    """Whatever number they have: SD 2.x and the G of SDXL pad with the number of an exclamation mark."""
    for family in FAMILIES:
        clip = clips(family)
        for text in ("", " ", "one " * 75):
            for encoder, words in read_words(clip, text).items():
                rows = len([token for chunk in clip.tokenize(text)[encoder] for token in chunk])
                spoken = [row for row in range(rows) if 0 < row < 76] if text.strip() else []
                assert [row for word in words for row in word.positions] == spoken
        with pytest.raises(ValueError, match=r"'\*' and chooses nothing.*The prompt has no words"):
            select(clip, "", "*")
        with pytest.raises(ValueError, match=r"'!' is not in the prompt\. The prompt has no words"):
            select(clip, "", "!")


# ---- finding the prompt again ---------------------------------------------------------------------------------------


def test_words_of_a_host_conditioning_survive_combining_and_concatenating(clips):
    chosen, positive, _ = select(clips(), "a red cat", "cat")
    other = nodes.CLIPTextEncode().encode(clips(), "a dog")[0]
    (combined,) = nodes.ConditioningCombine().combine(other, positive)
    assert [chosen.offset(tensor) for tensor, _ in combined] == [None, 0]
    (joined,) = nodes.ConditioningConcat().concat(other, positive)
    assert chosen.offset(joined[0][0]) == 77
    (limited,) = nodes.ConditioningSetMask().append(positive, torch.ones(1, 8, 8), "default", 1.0)
    assert chosen.offset(limited[0][0]) == 0
    (averaged,) = nodes.ConditioningAverage().addWeighted(positive, other, 0.5)
    assert chosen.offset(averaged[0][0]) is None
