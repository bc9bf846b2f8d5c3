"""Text encoders and inverted pictures, each made once; the host is imported where a test asks for it."""

import functools

import pytest


@pytest.fixture(autouse=True)
def _inference(request):
    """As the host runs nodes."""
    import torch

    with torch.inference_mode(request.node.get_closest_marker("host") is not None):
        yield


@pytest.fixture(scope="session")
def clips():
    """A text encoder by family."""
    from attention_fusion.fusing import CLIPS, encoder

    return {family: encoder(family) for family in CLIPS}


@pytest.fixture(scope="session")
def setup(clips):
    """By family, pictures and size: (model, clip, latent, trajectory, inverted noise)."""
    from attention_fusion.fusing import inverted

    @functools.cache
    def made(family="sd15", *size):
        return inverted(clips[family], family, *size)

    return made
