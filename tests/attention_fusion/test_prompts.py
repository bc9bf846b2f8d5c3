"""Two prompts compared word by word, as the host's tokenizers read them."""

import threading
import time

import comfy.model_management
import pytest
from attention_fusion.fusing import EDIT, SOURCE, families
from palimpsest.nodes.attention_fusion import prompts as reading
from palimpsest.nodes.attention_fusion.prompts import read_prompts


@families
def test_words_of_both_prompts_are_linked_and_the_hosts_tokens_too(clips, family):
    prompts = read_prompts(clips[family], SOURCE, EDIT)
    pairs = {0: 0, 1: 1, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9}  # start, a, dog in the park, end, first padding
    for source, edit in pairs.items():
        assert prompts.link[source, edit] == 1
    assert prompts.link.shape == (77, 77)
    assert prompts.own.nonzero()[:, 0].tolist() == [2, 3]  # very red
    assert prompts.link.sum() == 75
    assert "5 of 7 words are the source's; new: very, red; gone: brown" in prompts.report


def test_emphasis_and_replacement(clips):
    prompts = read_prompts(
        clips["sd15"], SOURCE, "a red dog in the park", new_words="attention of the words they replace", emphasis=3.0
    )
    assert prompts.link[2, 2] == 3
    assert prompts.own.count_nonzero() == 0
    kept = read_prompts(clips["sd15"], SOURCE, "a red dog in the park", emphasis=3.0)
    assert kept.own.nonzero()[:, 0].tolist() == [2]
    assert kept.own[2] == 3


def test_a_shorter_edit_leaves_its_last_padding_to_itself(clips):
    prompts = read_prompts(clips["sd15"], SOURCE, "a dog")
    assert prompts.link[[0, 1, 3, 7], [0, 1, 2, 3]].eq(1).all()  # start, a, dog, end
    assert prompts.own.nonzero()[:, 0].tolist() == [73, 74, 75, 76]


def test_a_long_edit_is_linked_chunk_by_chunk(clips):
    long = SOURCE + " and" * 90
    prompts = read_prompts(clips["sd15"], SOURCE, long)
    assert prompts.link.shape == (77, 154)
    assert prompts.link[1:7, 1:7].diagonal().eq(1).all()
    assert prompts.own[77:].eq(1).all()  # the source has no second chunk


def test_a_blend_word_that_is_not_in_the_source_is_refused(clips):
    with pytest.raises(ValueError, match="'red' is not in the prompt"):
        read_prompts(clips["sd15"], SOURCE, EDIT, blend_words="red")


def test_without_a_text_encoder_it_says_so():
    with pytest.raises(ValueError, match="this checkpoint holds no text encoder"):
        read_prompts(None, SOURCE, EDIT)


def test_a_text_without_end_is_refused_before_it_is_encoded(clips, monkeypatch):
    monkeypatch.setattr(clips["sd15"], "encode_from_tokens_scheduled", lambda _: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="tokens, Attention Fusion compares two prompts of at most 4928 each: shorten"):
        read_prompts(clips["sd15"], SOURCE, "a dog " * 17_000)


def test_comparing_the_longest_texts_stops_where_the_run_is_cancelled(clips, monkeypatch):
    linked, asked = reading.linked, []

    def cancel():
        comfy.model_management.interrupt_current_processing()
        asked.append(time.monotonic())

    def compare(*args):
        threading.Timer(0.2, cancel).start()
        return linked(*args)

    monkeypatch.setattr(reading, "linked", compare)
    longest = "a dog " * 2_300
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        read_prompts(clips["sd15"], longest, "one cat " + longest)
    assert time.monotonic() - asked[0] < 1
