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
    same = harness.sample(harness.apply(model, kv, "frozen"), start, *harness.prompts(family))
    harness.assert_close(same, rebuilt)
    harness.assert_acts(harness.sample(model, start), same)


def test_noise_is_added_to_a_latent_only_where_it_is_given():
    model = tiny_models.unet()
    latent, noise = tiny_models.latent()["samples"], harness.noise()
    plain = harness.sample(model, latent)
    assert harness.acts(harness.sample(model, latent, noise=noise), plain)
    assert torch.equal(harness.sample_noise(model, noise), harness.sample(model, torch.zeros_like(noise), noise=noise))
    assert not harness.acts(plain, plain)
