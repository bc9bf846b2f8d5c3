"""The training program's parts that need no host: gradient averaging, data, losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pocket import autoencoder as autoencoding
from pocket import checkpoint, fitting, metrics, parallel, train, train_judge, world
from pocket import judge as judging
from torch import nn


def average_gradients(averager: parallel.Averager, rank: int, path) -> None:
    """Two steps on a weight of 2 numbers whose gradient is the rank, then 10 times the rank."""
    weight = nn.Parameter(torch.zeros(2))
    averager.join(rank, [weight])
    seen = []
    for factor in (1, 10):
        weight.grad = torch.full((2,), float(factor * rank))
        averager.average()
        seen.append(weight.grad.tolist())
    torch.save(seen, path / f"{rank}.pt")


def test_one_process_keeps_its_gradient(tmp_path):
    parallel.run(average_gradients, 2, 1, tmp_path)
    assert torch.load(tmp_path / "0.pt") == [[0, 0], [0, 0]]


def test_pairs_show_one_animal_in_two_poses():
    for i in range(20):
        first, second = train.pair_of_scenes(i)
        assert first.pose != second.pose
        assert all(
            getattr(first, name) == getattr(second, name) for name in ("species", "colour", "texseed", "collar", "prop")
        )


def test_a_third_of_the_pairs_show_one_sign():
    pairs = [train.pair_of_scenes(i) for i in range(150)]
    assert all(first.sign == second.sign for first, second in pairs)
    assert np.mean([first.sign is not None for first, _ in pairs]) == pytest.approx(1 / 3, abs=0.1)


def test_drawn_pictures_have_signs_only_where_wanted(tmp_path):
    options = train.Options(tmp_path, "cpu", 1)
    images, masks, scenes = train.drawn(options, "plain", train.VALIDATION_SEED, 4)
    signed_images, signed_masks, signed = train.drawn(options, "signed", train.VALIDATION_SEED, 4, 1.0)
    assert [scene.sign for scene in scenes] == [None] * 4
    assert all(scene.sign for scene in signed)
    assert (masks == signed_masks).all() and (images != signed_images).any((1, 2, 3)).all()
    assert (train.focus_of(scenes, masks) == masks).all()
    focus = train.focus_of(signed, signed_masks) > 127
    assert ((images != signed_images).any(-1) & focus).any((1, 2)).all()


def train_a_little(averager: parallel.Averager, rank: int, folder, steps: int, resume: bool) -> None:
    """The mean of two numbers towards 3, by `fit`."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    options = train.Options(folder, "cpu", 1, steps=steps, resume=resume)
    recipe = {"lr": 0.1, "weight_decay": 0.0, "ema_decay": 0.9, "warm_up": 1}

    def loss():
        error = (model(torch.ones(1, 2)) - 3).square().mean()
        return error, {"error": error.item()}

    train.fit(
        model,
        averager,
        loss,
        options,
        **recipe,
        state=folder / "state.pt",
        save=lambda average: torch.save({name: value.clone() for name, value in average.items()}, folder / "ema.pt"),
    )


def test_training_goes_on_where_it_was_stopped(tmp_path):
    """Weights, their average, the optimizer's moments and the counts."""
    parallel.run(train_a_little, 3, 1, tmp_path, 30, False)
    state = torch.load(tmp_path / "state.pt")
    assert state["step"] == 30
    parallel.run(train_a_little, 3, 1, tmp_path, 30, True)  # nothing left to do
    again = torch.load(tmp_path / "state.pt")
    assert again["step"] == 30 and (again["average"][0] == state["average"][0]).all()
    parallel.run(train_a_little, 3, 1, tmp_path, 60, True)
    later = torch.load(tmp_path / "state.pt")
    assert later["step"] == 60
    assert (later["optimizer"]["state"][0]["step"], later["seconds"] > state["seconds"]) == (60, True)
    assert sum(v.sum() for v in later["model"].values()).item() == pytest.approx(3, abs=0.1)


def test_stored_weights_are_packed_and_come_back(tmp_path):
    weights = {"a.weight": torch.randn(8, 4), "a.bias": torch.randn(8)}
    train.save_weights(tmp_path / "w.safetensors", checkpoint.pack(weights), {"latent_mean": "0.5"})
    back, settings = checkpoint.load_weights(tmp_path / "w.safetensors")
    assert settings["latent_mean"] == "0.5"
    assert (back["a.weight"].float() - weights["a.weight"]).abs().max() < 0.02
    assert (tmp_path / "w.safetensors").stat().st_size < 1000


def test_training_never_draws_held_out_scenes():
    seeds = {train.TRAINING_SEED, train.VALIDATION_SEED, fitting.PAIR_SEED}
    assert world.HELD_OUT_SEED not in seeds


def test_schedule_is_sds_scaled_linear():
    alphas = train.alphas_cumprod()
    sigmas = ((1 - alphas) / alphas).sqrt()
    assert sigmas[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)


def test_shifted_areas_stay_under_their_pictures():
    scene = world.held_out_scenes(1)[0]
    picture = torch.from_numpy(world.render(scene)).movedim(-1, 0)[None].float() / 255
    areas = torch.from_numpy(train_judge.areas_of([scene])).float() / 255
    animal = torch.nn.functional.interpolate(areas[:, :1], scale_factor=2)
    stamped = animal.expand(-1, 3, -1, -1).contiguous()  # a picture that is its own mask
    for seed in range(4):
        moved, moved_areas = train_judge.augment(stamped, areas, np.random.default_rng(seed))
        found = torch.nn.functional.avg_pool2d(moved.mean(1, keepdim=True), 2)
        assert (found - moved_areas[:, :1]).abs().mean() < 0.1
    assert picture.shape == stamped.shape


def test_loss_ignores_undefined_attributes():
    judge = judging.Judge().eval()
    scene = world.edit(world.held_out_scenes(1)[0], species="bird", pattern="plain", socks=True, tailtip=False)
    answers, found = judge(torch.rand(2, 3, 128, 128))
    classes = judging.labels([scene, world.edit(scene, species="cat")])
    loss = train_judge.loss_of(answers, found, classes, torch.rand(2, 6, 64, 64))
    assert torch.isfinite(loss)


def test_autoencoder_shapes_and_start():
    model = autoencoding.Autoencoder()
    model.initialise(0)
    with torch.no_grad():
        latents = model.encode(torch.rand(1, 3, 32, 40))
        assert latents.shape == (1, 4, 4, 5)
        assert model.decode(latents).shape == (1, 3, 32, 40)


def test_autoencoder_equals_the_hosts(comfy_host_path):
    from comfy.taesd.taesd import TAESD
    from safetensors.torch import load_file

    host, ours = TAESD(latent_channels=4), autoencoding.load()
    host.load_state_dict({n: v.float() for n, v in load_file(autoencoding.WEIGHTS).items()}, strict=False)
    picture = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        latent = ours.encode(picture)
        assert torch.allclose(latent, host.taesd_encoder(picture), atol=1e-4)
        assert torch.allclose(ours.decode(latent), host.taesd_decoder(latent), atol=1e-4)


def test_shipped_autoencoder_keeps_the_animal_recognisable():
    scenes = world.held_out_scenes(12)
    drawn = metrics.to_float(np.stack([world.render(scene) for scene in scenes]))
    decoded = autoencoding.round_trip(autoencoding.load(), drawn)
    assert metrics.psnr(decoded, drawn).mean() > 25
    success = metrics.attribute_success(judging.load(), decoded, scenes)
    assert min(success[name] for name in world.CAPTIONED) >= 0.8, success
