"""Prompts as their encoder is given them, as pictures."""

import pytest
import tiny_models
import tiny_vlm
import torch
from palimpsest.nodes.multimodal import seen
from palimpsest.nodes.multimodal.encoder import join
from palimpsest.nodes.multimodal.interleaved import Picture
from palimpsest.nodes.multimodal.nodes import MultimodalPrompt

pytestmark = pytest.mark.usefixtures("inference")


def picture(height=30, width=50, seed=0, **shown):
    return Picture(tiny_models.picture(1, height, width, seed)[0], **{"tokens": 16, "name": "image1"} | shown)


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_every_token_is_a_word_or_a_pictures(loaded, kind):
    vlm = loaded(kind)
    prompt = ("a ", picture(), " dog in the snow")
    shown = seen.shown(vlm, "text", prompt, 40)
    ids, _ = vlm.tokenised(prompt)
    words = [item for item in shown.items if isinstance(item, seen.Word)]
    looked = [item for item in shown.items if isinstance(item, seen.Looked)]
    assert len(words) + sum(item.count for item in looked) == len(ids) == len(shown.kinds)
    assert [word.text for word in words if not word.special] == ["a", "dog", "in", "the", "snow"]
    assert [(item.count, item.grid) for item in looked] == [(16, 4)]
    before, after = (shown.items[shown.items.index(looked[0]) + step] for step in (-1, 1))
    assert before.special
    assert after.special
    assert sum(shown.kinds) == 16 + sum(word.special for word in words) - (kind == "idefics2")  # <s> is text


def test_a_picture_says_how_it_is_seen(loaded):
    def lines(**chosen):
        shown = seen.shown(loaded(), "text", (picture(**chosen),), 20)
        return next(item for item in shown.items if isinstance(item, seen.Looked)).lines()

    assert lines() == ("image1: 16 tokens", "50 x 30, padded to 50, seen at 28 px")
    assert lines(weight=0.5)[0] == "image1: 16 tokens, weight 0.5"
    assert lines(weight=0.0)[0] == "image1: 16 tokens, weight 0 (left out)"
    assert lines(width=30, tokens=4)[1] == "30 x 30, seen at 14 px"


def test_the_perceivers_tokens_lie_in_no_grid(loaded):
    shown = seen.shown(loaded(perceiver=True), "text", (picture(tokens=5),), 20)
    assert [(item.count, item.grid) for item in shown.items if isinstance(item, seen.Looked)] == [(5, 0)]


def test_a_very_long_text_is_cut_and_keeps_its_pictures(loaded, monkeypatch):
    monkeypatch.setattr(seen, "MOST_CHIPS", 3)
    shown = seen.shown(loaded(), "text", ("a red dog in the snow ", picture()), 40)
    assert [type(item).__name__ for item in shown.items] == ["Word"] * 4 + ["Looked"]
    assert shown.items[3].text == "... 6 more"
    alike = seen.shown(loaded(), "text", ("dog dog dog dog dog dog ", picture()), 40)
    assert [item.text for item in alike.items[1:4]] == ["dog", "dog", "... 6 more"]


def test_the_bar_says_what_counts(loaded):
    assert seen.bar_text(seen.Shown("", (), (False, True, True), 3)) == (
        "to the sampler: 1 of text (blue), 2 of pictures (orange)"
    )
    assert seen.bar_text(seen.Shown("", (), (False,) * 3, 8)).endswith(
        "repeated to 8 (grey), the last 2 do not count (white)"
    )


def test_the_node_gives_it_out_last_with_the_pixels_that_are_seen(loaded):
    encoder = join(loaded(), tiny_vlm.connector(loaded()))
    green = torch.zeros(1, 20, 40, 3)
    green[..., 1] = 1
    mask = torch.zeros(1, 20, 40)
    mask[:, 5:15, :] = 1
    inputs = {"model": tiny_models.unet(), "multimodal_encoder": encoder, "text": "a <image1:0.5> dog"}
    shown = tiny_models.execute(MultimodalPrompt, **inputs, images={"image1": green}, masks={"mask1": mask})[-1]
    assert shown.ndim == 4
    assert shown.shape[::3] == (1, 3)
    assert shown.shape[2] == seen.WIDTH
    pure = (shown[0] == torch.tensor([0.0, 1.0, 0.0])).all(-1).sum()
    area = seen.CELL**2 / 4  # the subject is four times as wide as high, padded with black
    assert 0.75 * area < pure <= area  # the grid and the frame lie over it
    black = (shown[0] == 0).all(-1).sum()
    assert black > 2 * area
