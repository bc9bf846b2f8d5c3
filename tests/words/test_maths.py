"""Words of prompts without the host: letters of the vocabulary, asking for words, and finding a prompt again."""

import pytest
import torch
from palimpsest.nodes import host
from palimpsest.nodes.words import ChosenWords, copies, decoded, joined_length, shortened
from palimpsest.nodes.words.choosing import choose
from palimpsest.nodes.words.reading import BYTES, Word


def test_every_byte_has_a_letter_in_the_vocabulary():
    assert sorted(BYTES.values()) == list(range(256))
    assert decoded(["caf", "\u00c3\u00a9</w>"]) == "caf\u00e9"


# ---- asking for words -----------------------------------------------------------------------------------------------


def read(text):
    """Every word a piece of its own, a token each, behind the start token."""
    return [Word((word.lower() + "</w>",), (row,), row) for row, word in enumerate(text.split(), 1)]


def positions(text, asked):
    return {entry: [row for word in found for row in word.positions] for entry, found in choose(
        read(text), asked, read).items()}  # fmt: skip


def test_asking_by_hand():
    text = "a red cat , and a red dog"
    assert positions(text, "red, red#2, red cat, a *#2") == {
        "red": [2, 7],
        "red#2": [7],
        "red cat": [2, 3],
        "a *#2": [6, 7],
    }
    assert list(positions(text, "*")) == ["red", "cat", "dog"]
    assert positions(text, "cat and") == {"cat and": [3, 4, 5]}  # the comma between them too
    with pytest.raises(ValueError, match="'red#3' asks for occurrence 3, but 'red' is in the prompt 2 times"):
        positions(text, "red#3")


# ---- finding the prompt again ---------------------------------------------------------------------------------------


def prompt(rows, seed):
    return torch.randn(1, rows, 6, generator=torch.Generator().manual_seed(seed))


def test_a_prompt_is_known_wherever_it_went():
    own, other = prompt(7, 1), prompt(7, 2)
    words = ChosenWords(("cat",), ((2, 3),), own)
    assert words.offset(own.expand(3, -1, -1)) == 0
    assert words.offset(torch.cat([other, own], 1)) == 7
    assert words.offsets(own.repeat(2, 3, 1)) == (0, 7, 14)
    assert words.offset(own.half()) == 0
    assert words.offset(torch.cat([own, other])) is None  # another picture of the batch has another prompt
    for foreign in (other, 0.5 * own + 0.5 * other, own[:, :5], own[..., :4], torch.zeros_like(own)):
        assert words.offset(foreign) is None


def call_of(*lengths):
    """A call of prompts of some lengths."""
    prompts = tuple(host.Prompt(prompt(length, seed), False) for seed, length in enumerate(lengths))
    areas, run = (None,) * len(lengths), host.Run()
    return host.ModelCall(torch.ones(1), prompts, areas, 1, (8, 8), text_length=0, model=None, run=run)


def test_prompts_of_different_lengths_are_repeated_to_one():
    call = call_of(4, 6)
    assert joined_length(call) == 12
    assert copies(call) == [range(0, 12, 4), range(0, 12, 6)]
    assert [list(begins) for begins in copies(call)] == [[0, 4, 8], [0, 6]]
    with pytest.raises(ValueError, match="a prompt of 12 tokens reaches a layer as 5"):
        raise shortened(call, 5)


def test_a_run_looks_a_prompt_up_once(monkeypatch):
    own, looked, run = prompt(7, 1), [], host.Run()
    words, sampled = ChosenWords(("cat",), ((2, 3),), own), host.Prompt(own.repeat(1, 2, 1), False)
    offsets = ChosenWords.offsets
    monkeypatch.setattr(ChosenWords, "offsets", lambda self, text: looked.append(text) or offsets(self, text))
    assert [words.starts(sampled, run) for _ in range(3)] == [(0, 7)] * 3
    assert len(looked) == 1
    assert words.starts(sampled, host.Run()) == (0, 7)
    assert words.starts(host.Prompt(None, False), run) == ()
