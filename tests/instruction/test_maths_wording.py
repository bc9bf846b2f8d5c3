"""What a model is asked and what is kept of its answer."""

import pytest
from palimpsest.nodes.instruction import wording


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("The cat will lie in snow.", "The cat will lie in snow."),
        ("USER: x ASSISTANT: The park is white. Trees are bare. It is cold.</s>", "The park is white. Trees are bare."),
        ("A snowy park. Alternatively, rain.", "A snowy park."),
        ("A snowy park [IMG0] [IMG1]", "A snowy park"),
        ("<think>hm. what?</think>\n\nA snowy\npark", "A snowy park"),
        ('He says "go." Then he runs! Then he sits.', 'He says "go." Then he runs!'),
        ("It is 1.5 m of snow. Two. Three.", "It is 1.5 m of snow. Two."),
        (
            "\u96ea\u5728\u4e0b\u3002\u732b\u8db4\u7740\u3002\u51b7\u3002",
            "\u96ea\u5728\u4e0b\u3002\u732b\u8db4\u7740\u3002",
        ),
        ("<think>never ends", ""),
    ],
)
def test_what_is_kept(answer, kept):
    assert wording.cleaned(answer) == kept


def test_what_is_asked():
    assert wording.asked(wording.QUESTION, " make it\nwinter ") == "what will this image be like if 'make it winter'"
    with pytest.raises(ValueError, match=r"without \{instruction\}"):
        wording.asked("what now?", "make it winter")


def test_a_summary_ends_with_a_sentence_where_one_fits():
    text = "One two three. Four five. Six seven eight."
    assert wording.shortened(text, 6) == "One two three. Four five."
    assert wording.shortened(text, 2) == "One two"
    assert wording.shortened(text, 0) == text
    assert not wording.is_longer(text, 8)
    assert wording.is_longer(text, 7)


def test_a_line_for_all_pictures_or_for_each():
    assert wording.for_each("a\n\n", 2, "instruction") == ["a", "a"]
    assert wording.for_each("a\nb", 2, "instruction") == ["a", "b"]
    with pytest.raises(ValueError, match="instruction has 2 lines for 3 pictures"):
        wording.for_each("a\nb", 3, "instruction")
    with pytest.raises(ValueError, match="instruction is empty"):
        wording.for_each(" \n", 1, "instruction")
