"""The pocket transformer's training, and the autoencoder of more channels that it reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pocket import autoencoder as autoencoding
from pocket import checkpoint, parallel, text_encoder, train, transformer
from torch import nn


def test_times_are_logit_normal_one_in_each_stratum():
    rng = np.random.default_rng(0)
    t = transformer.levels((rng.permutation(64) + rng.random(64)) / 64).sort().values.double()
    shares = torch.special.ndtr(torch.logit(t))
    assert ((shares * 64).floor() == torch.arange(64)).all()


def test_partners_look_at_each_others_picture_and_at_their_own_text():
    length, (q, k, v) = text_encoder.LENGTH, torch.randn(3, 4, 2, text_encoder.LENGTH + 5, 8).unbind()
    found = transformer.see_partner(F.scaled_dot_product_attention, q, k, v)
    for row, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
        keys, values = (torch.cat([each[row], each[partner, :, length:]], 1) for each in (k, v))
        torch.testing.assert_close(found[row], F.scaled_dot_product_attention(q[row], keys, values))


def test_more_channels_keep_what_the_first_ones_say():
    given = autoencoding.load()
    wider = given.with_channels(16)
    pictures = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(wider.encode(pictures)[:, :4], given.encode(pictures))
    latent = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(wider.decode(F.pad(latent, (0, 0, 0, 0, 0, 12))), given.decode(latent))


def test_held_layers_of_the_encoder_end_at_half_resolution():
    model = autoencoding.Autoencoder(16)
    model.hold_fine_encoder()
    held = [layer for layer in model.taesd_encoder if not any(p.requires_grad for p in layer.parameters())]
    assert nn.Sequential(*held)(torch.rand(1, 3, 32, 32)).shape == (1, 64, 16, 16)
    assert model.taesd_encoder[len(held)].stride == (2, 2) and all(
        p.requires_grad for p in model.taesd_decoder.parameters()
    )


@pytest.mark.host
def test_it_trains_goes_on_and_keeps_weights_that_the_host_loads(tmp_path, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", False)  # the training sets it
    z = np.random.default_rng(0).standard_normal((4, 2, transformer.CHANNELS, 16, 16)).astype(np.float16)
    np.savez(tmp_path / "latents.npz", z=z, mean=0.1, std=0.9)
    for steps, resume in ((3, False), (5, True)):
        options = train.Options(tmp_path, "cpu", 1, batch=2, steps=steps, resume=resume)
        parallel.run(transformer.train, 0, 1, options)
    weights, told = checkpoint.load_weights(tmp_path / transformer.WEIGHTS)
    model = transformer.build()
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    assert told == {"latent_mean": "0.1", "latent_std": "0.9"}
    with torch.no_grad():
        drawn = model(torch.randn(1, 16, 16, 16), torch.tensor([0.5]), torch.randn(1, 77, 768), transformer_options={})
    assert drawn.shape == (1, 16, 16, 16) and drawn.isfinite().all() and drawn.abs().max() > 0
