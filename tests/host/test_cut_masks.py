"""A mask painted on a picture that the host's VAE cuts acts where it was painted, in every node that takes one."""

import harness
import pytest
import tiny_models
import torch
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.feature_blend.nodes import FeatureBlend

PICTURE = (71, 79)  # of which 64 x 72 pixels are encoded: rows 3 to 66, columns 3 to 74


@pytest.fixture
def painted():
    """(a mask on the picture, the part of it that the latent shows), random cells of 4 pixels."""
    mask = torch.rand(1, *PICTURE, generator=torch.Generator().manual_seed(4)).round()
    return mask, mask[:, 3:67, 3:75].clone()


def both(inference, node, painted, **inputs):
    """What is sampled with either mask, and with the mask as if it were stretched over the latent."""
    model = tiny_models.unet()
    trajectory, noise, *_ = harness.invert(model, tiny_models.latent(1, 8, 9))
    values = inputs | (
        {"trajectory": trajectory, "positive": harness.prompts("sd15")[0]} if node is FeatureBlend else {}
    )
    stretched = torch.nn.functional.interpolate(painted[0][None], size=(8, 9), mode="area")[0]
    masks = (*painted, stretched)
    return [harness.sample(tiny_models.execute(node, model=model, mask=mask, **values)[0], noise) for mask in masks]


@pytest.mark.parametrize("node", [CrossAttentionMask, FeatureBlend])
def test_a_mask_of_the_picture_acts_as_the_part_that_was_encoded(inference, painted, node):
    whole, part, stretched = both(inference, node, painted)
    assert torch.equal(whole, part)
    harness.assert_acts(whole, stretched)


@pytest.mark.parametrize("grow", [2.0, -1.0])
def test_a_grown_mask_too(inference, painted, grow):
    whole, part, _ = both(inference, FeatureBlend, painted, grow_mask=grow)
    assert torch.equal(whole, part)
