"""Synthetic Prompts: which contents meet which styles, what is cut out of them, what is refused."""

from collections import Counter

import pytest
from palimpsest.nodes.multimodal.dataset.synthetic import PairSettings, SyntheticPrompts, marked, pairs

CONTENTS = "a [man] and a [dog] hiking.\n# not this\n\na [big cat]\na tree"
STYLES = "oil\nink\nclay\nphoto\nink"


def made(**values):
    return SyntheticPrompts.execute(**{"contents": CONTENTS, "styles": STYLES} | values)


def test_every_content_comes_in_so_many_different_styles():
    prompts, words, seeds, report = made(styles_each=3, seed=5).args
    contents, styles = zip(*(prompt.rsplit(", ", 1) for prompt in prompts), strict=True)
    assert Counter(contents) == {"a man and a dog hiking": 3, "a big cat": 3, "a tree": 3}
    assert len(set(prompts)) == len(set(seeds)) == 9 and set(styles) == {"oil", "ink", "clay", "photo"}
    assert words == ["man, dog"] * 3 + ["big cat"] * 3 + [""] * 3
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert report.startswith("9 prompts of 3 contents and 4 styles; 6 say what is to be cut out; the first: 'a man and")
    assert len(made(styles_each=0).args[0]) == len(made(styles_each=99).args[0]) == 12


def test_the_seed_chooses_and_a_line_keeps_its_pictures_when_others_are_added():
    first = pairs(PairSettings(CONTENTS, STYLES, 2, seed=1))
    assert first == pairs(PairSettings(CONTENTS, STYLES, 2, seed=1))
    assert first != pairs(PairSettings(CONTENTS, STYLES, 2, seed=2))
    assert first == pairs(PairSettings(CONTENTS + "\na house", STYLES, 2, seed=1))[: len(first)]
    some = pairs(PairSettings(CONTENTS, STYLES, 2, most=3, seed=1))
    assert len(some) == 3 and set(some) < set(first)


def test_without_styles_the_contents_come_alone():
    assert made(styles=" \n# none").args[0] == ["a man and a dog hiking.", "a big cat", "a tree"]


def test_brackets_mark_what_is_cut_out():
    assert marked("a [ big  man] with a [dog]") == ("a big man with a dog", ("big man", "dog"))
    assert marked("a tree") == ("a tree", ())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"contents": "\n#x\n"}, "contents holds no line"),
        ({"contents": "a [man"}, r"contents has 'a \[man', whose brackets"),
        ({"contents": "a [] man"}, "whose brackets hold nothing"),
        ({"contents": "a [[man]]"}, "do not match"),
        (
            {"contents": "\n".join(map(str, range(400))), "styles": "\n".join(map(str, range(300))), "styles_each": 0},
            "400 contents with 300 styles each are 120000 prompts, at most 100000",
        ),
    ],
)
def test_what_makes_no_prompts_is_said(values, words):
    with pytest.raises(ValueError, match=words):
        made(**values)
