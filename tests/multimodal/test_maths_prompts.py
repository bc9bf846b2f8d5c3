"""Prompts of words and pictures: a text taken apart, and its pictures made ready to be looked at."""

import pytest
import torch
from palimpsest.nodes.multimodal import interleaved
from palimpsest.nodes.multimodal.interleaved import Placeholder, parse

# ---- reading a text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a red dog", ("a red dog",)),
        ("", ()),
        ("a <image1> dog", ("a ", Placeholder(1), " dog")),
        ("{image1}<image2>", (Placeholder(1), Placeholder(2))),
        ("<Image 1> and {picture_2}", (Placeholder(1), " and ", Placeholder(2))),
        ("<image1:0.5>", (Placeholder(1, 0.5),)),
        ("<image1: -1.5, tokens = 64> x", (Placeholder(1, -1.5, 64), " x")),
        ("<image2, tokens=16>", (Placeholder(2, 1.0, 16),)),
        (
            "the dog of Picture 1 in the style of image 2",
            ("the dog of ", Placeholder(1), " in the style of ", Placeholder(2)),
        ),
        ("a <image1> picture 2", ("a ", Placeholder(1), " picture 2")),
        ("an image of a dog", ("an image of a dog",)),
    ],
)
def test_a_text_is_taken_apart(text, parts):
    assert parse(text) == parts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a <image> dog", "'<image>' names no picture"),
        ("a {picture} dog", "names no picture"),
        ("a <image1> <image one>", "'<image one>' names no picture"),
        ("<image1:much>", "cannot be read"),
        ("<image1:1, tokens=many>", "cannot be read"),
        ("<image1:9>", "must be from -4 to 4"),
        ("<image1:nan>", "must be from -4 to 4"),
    ],
)
def test_a_placeholder_that_cannot_be_read_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_words_without_pictures():
    assert interleaved.words_only("a <image1> dog, {image2:0.5} style") == "a dog, style"


# ---- preparing a picture


def test_a_picture_is_padded_with_black_to_a_square_around_its_middle():
    square = interleaved.squared(torch.ones(2, 4, 3), 4)
    assert square.shape == (1, 3, 4, 4)
    assert torch.equal(square[0, 0], torch.tensor([[-1.0] * 4, [1.0] * 4, [1.0] * 4, [-1.0] * 4]))


def test_a_high_picture_is_padded_at_its_sides():
    square = interleaved.squared(torch.ones(4, 2, 3), 4)
    assert torch.equal(square[0, 0], torch.tensor([[-1.0, 1.0, 1.0, -1.0]] * 4))


def test_a_mask_cuts_out_and_removes_or_keeps_the_background():
    shown = torch.full((6, 8, 3), 0.5)
    mask = torch.zeros(1, 6, 8)
    mask[0, 1, 2] = mask[0, 3, 5] = 1.0
    cut = interleaved.cut_out(shown, mask, "image1", remove=True)
    assert cut.shape == (3, 4, 3)
    assert torch.count_nonzero(cut) == 6
    assert torch.equal(interleaved.cut_out(shown, mask, "image1", remove=False), shown[1:4, 2:6])


def test_a_mask_of_another_size_is_brought_to_the_picture():
    mask = torch.zeros(1, 3, 4)
    mask[0, :, 2:] = 1.0
    shown = torch.rand(6, 8, 3)
    assert torch.equal(interleaved.cut_out(shown, mask, "image1", remove=False), shown[:, 4:])
    assert torch.equal(
        interleaved.cut_out(shown.transpose(0, 1), mask.mT, "image1", remove=False), shown[:, 4:].transpose(0, 1)
    )
