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
        ("a \uff1cimage1\uff1e dog", ("a ", Placeholder(1), " dog")),
        (
            "\u4e00\u53ea\uff5bimage\uff11\uff1a0.5\uff0ctokens\uff1d64\uff5d\u72d7",
            ("\u4e00\u53ea", Placeholder(1, 0.5, 64), "\u72d7"),
        ),
        ("image1\u7684\u72d7", (Placeholder(1), "\u7684\u72d7")),
        ("Picture 1: 3 dogs", (Placeholder(1), ": 3 dogs")),
        ("the dog (image 1) runs", ("the dog (", Placeholder(1), ") runs")),
        ("<image1> is 2 > 1", (Placeholder(1), " is 2 > 1")),
        ("<images> of dogs", ("<images> of dogs",)),
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
        ("a <image1:0,3> dog", r"'<image1:0,3>' cannot be read: write a weight with a point, as in <image1:0.8>"),
        ("a \uff1cimage1\uff1a0\uff0c7\uff1e dog", "cannot be read"),
        ("<image1:0,7> <image2>", "cannot be read"),
        ("<image1:>", "'<image1:>' cannot be read"),
        ("<image1, tokens=>", "cannot be read"),
        ("<image1, 0.8>", "cannot be read"),
        ("<image1:0.8:2>", "cannot be read"),
        ("<image1:0.8, tokens=64, x=1>", "cannot be read"),
        ("<image1, tokens=-5>", "cannot be read"),
        ("<image1 0.8>", "'<image1 0.8>' names no picture"),
        ("<image1;0.8>", "names no picture"),
        ("<image#1>", "'<image#1>' names no picture"),
        ("<image_one>", "names no picture"),
        ("a <image1 dog", "'<image1 dog' names no picture"),
        ("a <image1", "names no picture"),
        ("a image1> dog", "'image1>' names no picture"),
        ("image1:0.7> dog", "'image1:0.7>' names no picture"),
        ("a <image1> and <image2 dog", "'<image2 dog' names no picture"),
        ("(image1:0.7) dog", r"the weight in 'image1:0.7' stands outside of the brackets"),
        ("(image1:1) dog", "stands outside of the brackets"),
        ("a (<image1>:1.2) dog", r"the weight in '<image1>:1.2' stands outside"),
        ("<image1>: 0,7 dog", "stands outside"),
        ("<image0>", "numbered from 1 to 10"),
        ("<image11>", "numbered from 1 to 10"),
        ("<image" + "9" * 5000 + ">", "cannot be read"),
    ],
)
def test_a_placeholder_that_cannot_be_read_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_words_without_pictures():
    assert interleaved.words_only("a <image1> dog, {image2:0.5} style") == "a dog, style"


# ---- preparing a picture


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_of_one_three_or_four_channels_is_shown_in_colours(channels):
    shown = interleaved.single(torch.full((1, 4, 6, channels), 0.25), "image1")
    assert torch.equal(shown, torch.full((4, 6, 3), 0.25))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.rand(1, 4, 6, 2), r"image1 has the form \(1, 4, 6, 2\): connect pictures of 1 .grey., 3"),
        (torch.rand(4, 6, 3), r"has the form \(4, 6, 3\)"),
        ("a latent", "has the form str"),
        (torch.rand(1, 0, 6, 3), "is empty or holds NaN"),
        (torch.rand(2, 4, 6, 1), "holds 2 pictures and stands for one"),
    ],
)
def test_a_picture_of_another_form_is_refused(image, says):
    with pytest.raises(ValueError, match=says):
        interleaved.numbered({"image1": image}, {}, remove=True)


@pytest.mark.parametrize("name", ["image0", "image11", "image", "picture1", "image1.5"])
def test_a_name_that_no_prompt_can_say_is_refused(name):
    with pytest.raises(ValueError, match="is no input: they are image1 to image10"):
        interleaved.numbered({name: torch.rand(1, 4, 6, 3)}, {}, remove=True)


@pytest.mark.parametrize("mask", [torch.full((1, 4, 6), torch.nan), torch.zeros(0, 4, 6), torch.tensor(1.0)])
def test_a_mask_without_numbers_is_refused(mask):
    with pytest.raises(ValueError, match="the mask of image1 has no pixels, or NaN in them"):
        interleaved.cut_out(torch.rand(4, 6, 3), mask, "image1", remove=True)


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
