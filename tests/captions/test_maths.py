"""Captions of content alone."""

import pytest
from palimpsest.kernels.captions import Vocabulary, reduce, with_trigger
from palimpsest.kernels.scripts import split_lines, split_list


@pytest.mark.parametrize(
    ("caption", "kept", "dropped"),
    [
        ("tree, water, mountain", "tree, water, mountain", []),
        ("a house by the sea", "a house by the sea", []),
        ("a painting of a mountain with trees in the foreground, by Wang Hui, trending on artstation, highly detailed",
         "a mountain with trees", ["a painting of", "in the foreground", "by Wang Hui", "trending on artstation",
                                   "highly detailed"]),
        ("A close-up photo of a tabby cat, eyes open", "a tabby cat, eyes open", ["A close-up photo of"]),
        ("a red cat standing on the left in the snow", "a red cat standing in the snow", ["on the left"]),
        ("a cat with a blurry background", "a cat", ["blurry background"]),
        ("a pagoda in a traditional chinese painting style, mountains", "a pagoda, mountains",
         ["in a traditional chinese painting style"]),
        ("an ink drawing of a boat in the style of ukiyo-e", "a boat",
         ["an ink drawing of", "in the style of ukiyo-e"]),
        ("A man with a beard. Oil on canvas.", "A man with a beard", ["Oil on canvas"]),
        ("portrait", "", ["portrait"]),
        ("a cat\uff0chighly detailed\u3002", "a cat", ["highly detailed"]),
        ("", "", []),
    ],
)  # fmt: skip
def test_what_tells_the_style_or_the_layout_is_left_out(caption, kept, dropped):
    found = reduce(caption)
    assert (found.text, found.dropped) == (kept, dropped)
    assert reduce(kept).text == kept


def test_words_may_be_added_and_kept():
    caption = "a picture of a wall, a red shan shui scroll"
    assert reduce(caption, Vocabulary(more=frozenset({"shan shui"}))).text == "a wall, a red scroll"
    assert reduce(caption, Vocabulary(kept=frozenset({"picture"}))).text == caption


def test_a_word_within_a_word_stays():
    assert reduce("a startled artist in a smart cart").dropped == []


def test_the_trigger_comes_once():
    assert with_trigger("a cat", " zwx ") == "zwx, a cat"
    assert with_trigger("Zwx, a cat", "zwx") == "Zwx, a cat"
    assert with_trigger("zwxy", "zwx") == "zwx, zwxy"
    assert with_trigger("", "zwx") == "zwx"
    assert with_trigger("a cat", "") == "a cat"


def test_words_of_scripts_without_blanks_are_left_out_where_they_stand():
    oil, style, cat, grass = "\u6cb9\u753b", "\u98ce\u683c", "\u732b", "\u8349\u5730\u4e0a"
    found = reduce(f"{cat}\u3001{oil}{style}\uff0c{grass}{oil}", Vocabulary(more=frozenset({oil, style})))
    assert (found.text, found.dropped) == (f"{cat}, {grass}", [oil + style, oil])


def test_a_list_has_commas_of_any_script():
    assert split_list("a cat, red\uff0csnow\u3001 tail\n\n,\u060csea") == ["a cat", "red", "snow", "tail", "sea"]
    assert split_list(" \uff0c\n") == []


def test_a_text_has_the_lines_that_editors_show():
    assert split_lines("\ufeffa cat\r\n\n  a dog\u2028in snow \ra\x0btree") == [
        "a cat",
        "a dog\u2028in snow",
        "a\x0btree",
    ]
    assert split_lines("\n \ufeff\n") == []
