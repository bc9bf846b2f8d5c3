"""One inverted picture for each file of tests; the host is imported where a test asks for it."""

import pytest


@pytest.fixture(autouse=True)
def _inference(request):
    """As the host runs nodes."""
    import torch

    with torch.inference_mode(request.node.get_closest_marker("host") is not None):
        yield


@pytest.fixture(scope="module")
def inverted():
    """(model, trajectory, inverted noise) of one picture."""
    import tiny_models
    import torch
    from feature_blend.blending import invert, original

    with torch.inference_mode():
        model = tiny_models.unet()
        return model, *invert(model, tiny_models.latent(), original())


@pytest.fixture(scope="module")
def plain(inverted):
    """What the model samples from that noise with nothing blended."""
    import torch
    from feature_blend.blending import sample

    with torch.inference_mode():
        return sample(inverted[0], inverted[2])
