"""The pocket transformer's files in the host: its latents' scale, what it draws, what is missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from pocket import autoencoder as autoencoding
from pocket import checkpoint, flow_files, metrics, world
from pocket import judge as judging


@pytest.fixture(scope="module")
def loaded(comfy_host_path):
    from benchmarks.flow_scenes import load_flow

    with torch.inference_mode():
        return load_flow()


def pictures_of(scenes: list[world.Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([world.render(scene) for scene in scenes])).float() / 255


@pytest.mark.host
def test_the_host_takes_it_for_a_flux_that_reads_what_it_was_trained_on(loaded, inference):
    model, _, vae = loaded
    scenes = world.held_out_scenes(2)
    _, settings = checkpoint.load_weights(checkpoint.WEIGHTS / flow_files.TRANSFORMER)
    encoder = autoencoding.load(checkpoint.WEIGHTS / flow_files.AUTOENCODER)
    z = encoder.encode(pictures_of(scenes).movedim(-1, 1))
    given = model.model.process_latent_in(vae.encode(pictures_of(scenes)).float())
    mean, std = float(settings["latent_mean"]), float(settings["latent_std"])
    torch.testing.assert_close(given, (z - mean) / std, atol=0.03, rtol=0.02)
    assert type(model.model).__name__ == "Flux" and vae.latent_channels == 16
    assert metrics.psnr(vae.decode(vae.encode(pictures_of(scenes))), pictures_of(scenes)).min() > 28


@pytest.mark.host
def test_it_draws_what_captions_say(loaded, inference):
    import nodes as host_nodes

    model, clip, vae = loaded
    scenes = world.held_out_scenes(8, seed=123)
    texts, nothing = (
        torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts])
        for texts in ([world.caption(scene) for scene in scenes], [""])
    )
    (latent,) = host_nodes.KSampler().sample(
        model, 0, 10, 3.0, "euler", "simple", [[texts, {}]], [[nothing, {}]],
        {"samples": torch.zeros(8, vae.latent_channels, 16, 16)}, 1.0,
    )  # fmt: skip
    right = metrics.attribute_success(judging.load(), vae.decode(latent["samples"]).clamp(0, 1), scenes)
    assert min(right[name] for name in ("colour", "pose", "side", "place")) > 0.8  # its species are not sure yet


def test_missing_weights_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flow_files", "--out", str(tmp_path / "out"), "--weights", str(tmp_path)])
    assert flow_files.main() == 1
    assert f"{flow_files.TRANSFORMER} cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
