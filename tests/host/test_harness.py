"""The harness itself: what the tests of nodes rest on is the host's own work."""

import harness
import pytest
import tiny_models
import torch

pytestmark = pytest.mark.usefixtures("inference")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_picture_is_inverted_tuned_and_drawn_again(family):
    model = tiny_models.unet(family)
    trajectory, start, *_ = harness.invert(model)
    kv, rebuilt, _ = harness.tune(model, trajectory)
    own = harness.prompts(family)
    plain = harness.sample(model, start, *own)
    again = harness.sample(harness.apply(model, kv, "recompute"), start, *own)
    assert float((again - rebuilt).norm()) < float((plain - rebuilt).norm())  # what was tuned brings the picture back
    harness.assert_acts(again, plain)


def test_noise_is_added_to_a_latent_only_where_it_is_given():
    model = tiny_models.unet()
    latent, noise = tiny_models.latent()["samples"], harness.noise()
    plain = harness.sample(model, latent)
    assert harness.acts(harness.sample(model, latent, noise=noise), plain)
    assert torch.equal(harness.sample_noise(model, noise), harness.sample(model, torch.zeros_like(noise), noise=noise))
    assert not harness.acts(plain, plain)
