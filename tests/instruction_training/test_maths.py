"""The equations of a training to follow instructions."""

import pytest
import torch
from palimpsest.kernels import instruction_training as maths
from palimpsest.kernels.cross_attention_mask import after_softmax


def test_a_widened_convolution_ignores_the_picture():
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float16)
    wide = maths.with_picture_channels(weight, 4)
    assert wide.shape == (6, 8, 3, 3)
    assert wide.dtype == weight.dtype
    latent, picture = torch.randn(1, 4, 5, 7), torch.randn(1, 4, 5, 7)
    both = torch.nn.functional.conv2d(torch.cat([latent, picture], 1), wide.float())
    torch.testing.assert_close(both, torch.nn.functional.conv2d(latent, weight.float()), rtol=0, atol=1e-5)


def test_the_bands_lie_side_by_side():
    draws = torch.tensor([0.0, 0.049, 0.05, 0.099, 0.1, 0.149, 0.15, 0.99])
    text, picture = maths.dropout_bands(draws, 0.05, 0.05, 0.05)
    assert text.tolist() == [False] * 4 + [True] * 4
    assert picture.tolist() == [True, True, False, False, False, False, True, True]


def test_the_bands_have_their_shares():
    draws = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    text, picture = maths.dropout_bands(draws, 0.05, 0.1, 0.02)
    found = [(~text & picture), (~text & ~picture), (text & ~picture)]
    assert [round(float(rows.float().mean()), 2) for rows in found] == [0.05, 0.1, 0.02]


@pytest.mark.parametrize("bands", [(0.5, 0.4, 0.2), (-0.1, 0.1, 0.1)])
def test_bands_that_do_not_fit_are_a_sentence(bands):
    with pytest.raises(ValueError, match=r"lower them, 0\.05 each"):
        maths.dropout_bands(torch.zeros(1), *bands)


def test_two_guidances_by_hand_and_at_their_limits():
    both, picture, neither = (torch.full((1, 1, 1, 1), value) for value in (5.0, 3.0, 2.0))
    assert float(maths.two_guidances(both, picture, neither, 7.5, 1.5)) == 2 + 1.5 * 1 + 7.5 * 2
    torch.testing.assert_close(maths.two_guidances(both, picture, neither, 1.0, 1.0), both)
    torch.testing.assert_close(maths.two_guidances(both, picture, neither, 0.0, 1.0), picture)
    torch.testing.assert_close(maths.two_guidances(both, picture, neither, 0.0, 0.0), neither)


def test_two_guidances_are_the_hosts_dual_guider():
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    rows = {"negative": torch.randn(1, 4, 5, 3), "middle": torch.randn(1, 4, 5, 3), "positive": torch.randn(1, 4, 5, 3)}
    text, seen = 7.5, 1.5
    # cfg1 guides the text against the picture alone, cfg2 the picture against nothing (style regular).
    theirs = rows["negative"] + seen * (rows["middle"] - rows["negative"]) + text * (rows["positive"] - rows["middle"])
    ours = maths.two_guidances(rows["positive"], rows["middle"], rows["negative"], text, seen)
    torch.testing.assert_close(ours, theirs)
    assert hasattr(Guider_DualCFG, "predict_noise")


def test_the_reconstruction_is_of_the_edited_picture():
    edited, noise_error = torch.randn(2, 4, 3, 5), torch.tensor([0.5, 0.25])
    assert torch.equal(maths.towards_the_edited(noise_error, edited + 2, edited, 0.0), noise_error)
    torch.testing.assert_close(maths.towards_the_edited(noise_error, edited + 2, edited, 0.5), noise_error + 0.5 * 4)
    half = maths.towards_the_edited(noise_error, edited.half(), edited.half(), 1.0)
    torch.testing.assert_close(half, noise_error)


def test_masked_values_are_the_masked_attention():
    """M (A V) = (A (.) M) V for a mask that is the same for all tokens, odd sizes."""
    scores, value = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    mask = torch.rand(2, 5, dtype=torch.float64)
    wanted = after_softmax(scores, mask[..., None]) @ value
    torch.testing.assert_close(maths.words_within(torch.softmax(scores, -1) @ value, mask), wanted)
    assert torch.equal(maths.words_within(value.half(), torch.ones(2, 7)), value.half())
