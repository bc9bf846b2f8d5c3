"""What several files of KV Inversion's tests look at."""

import pytest
import torch


@pytest.fixture(scope="module")
def tuned():
    """(model, latent, trajectory, kv, reconstruction) of one tuning of a tiny model."""
    import tiny_models
    from kv import runs

    with torch.inference_mode():
        model, latent = tiny_models.unet(), tiny_models.latent()
        trajectory = runs.record(model, latent)
        return model, latent, trajectory, *runs.tune(model, trajectory)[:2]
