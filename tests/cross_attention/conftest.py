"""Fixtures of Cross-Attention Mask's tests in the host."""

import pytest
import torch


@pytest.fixture
def inference():
    """As the host runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model():
    """A tiny SD 1.5."""
    import tiny_models

    with torch.inference_mode():
        return tiny_models.unet()


@pytest.fixture(scope="module")
def plain(model):
    """What it draws without a mask."""
    from cross_attention import masked

    with torch.inference_mode():
        return masked.sample(model, *masked.prompts())
