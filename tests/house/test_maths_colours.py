"""Pictures of one, three and four channels, and what is no picture."""

import pytest
import torch
from palimpsest.nodes.colours import rgb


def test_one_channel_stands_for_three_and_a_fourth_is_left_out():
    image = torch.rand(2, 4, 6, 4)
    assert torch.equal(rgb(image, "image"), image[..., :3])
    assert torch.equal(rgb(image[..., :3], "image"), image[..., :3])
    assert torch.equal(rgb(image[..., 1:2], "image"), image[..., 1:2].repeat(1, 1, 1, 3))
    assert rgb(image, "image").data_ptr() == image.data_ptr()  # no copy
    image[..., 3] = torch.nan  # nobody looks at it
    assert torch.isfinite(rgb(image, "image")).all()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.rand(2, 40, 48, 2), r"source has the form \(2, 40, 48, 2\): connect pictures of 1 .grey., 3"),
        (torch.rand(40, 48, 3), r"source has the form \(40, 48, 3\)"),
        ({"samples": 1}, "source has the form dict"),
        (None, "source has the form NoneType"),
        (torch.rand(2, 0, 48, 3), "source is empty or holds NaN"),
        (torch.rand(0, 4, 4, 3), "source is empty or holds NaN"),
        (torch.tensor([0.5, torch.inf, 0.5]).expand(1, 4, 4, 3), "source is empty or holds NaN"),
    ],
)
def test_what_is_no_picture_is_told(image, says):
    with pytest.raises(ValueError, match=says):
        rgb(image, "source")
