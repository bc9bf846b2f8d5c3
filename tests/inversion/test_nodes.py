"""Invert in the host: exactness, cost, families, batches, and what is refused."""

import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import pytest
import tiny_models
import torch
from comfy.patcher_extension import WrappersMP
from palimpsest.nodes.inversion import ddim as inversion
from palimpsest.nodes.inversion import flow
from palimpsest.nodes.inversion.nodes import Invert

STEPS = 6

pytestmark = pytest.mark.usefixtures("inference")


def invert(model, latent, family="sd15", **changes):
    """Run the node as the host would, with its defaults."""
    inputs = {"model": model, "latent": latent, "positive": tiny_models.prompt(1, family=family), "steps": STEPS}
    return tiny_models.execute(Invert, **inputs | changes)


SETTINGS = {
    "steps": 7,
    "guidance": 2.0,
    "scheduler": "karras",
    "predict_at": inversion.CURRENT_LEVEL,
    "reconstruction_guidance": 3.0,
    "flow_method": flow.FIREFLOW,
    "context_strength": 0.5,
    "context_refinements": 3,
}


def test_every_input_arrives_in_the_field_of_its_name():
    assert inversion.InvertSettings.of(SETTINGS).named() == SETTINGS


def test_every_input_arrives_where_it_acts(monkeypatch):
    model, latent = tiny_models.unet(), tiny_models.latent()
    given = {"model": model, "latent": latent, "positive": tiny_models.prompt(1), "negative": tiny_models.prompt(2)}
    calls = []

    def noted(name, plain):
        monkeypatch.setattr(
            inversion, name, lambda *args, **named: (calls.append((args, named)), plain(*args, **named))[1]
        )

    for name in ("descending_schedule", "invert"):
        noted(name, getattr(inversion, name))
    plain = inversion.host.sample
    monkeypatch.setattr(inversion.host, "sample", lambda *a, **named: (calls.append((a, named)), plain(*a, **named))[1])
    trajectory, _, _, report, _ = Invert.execute(**given, **SETTINGS).args
    schedule, inverted, climbed, descended = calls
    assert schedule[0] == (model, "karras", 7, None)
    assert (inverted[1]["guidance"], inverted[1]["predict_at"]) == (2.0, inversion.CURRENT_LEVEL)
    assert climbed[0][1].climb.predict_at == inversion.CURRENT_LEVEL
    assert (climbed[1]["guidance"], descended[1]["guidance"]) == (2.0, 3.0)
    assert (trajectory.steps, trajectory.guidance) == (7, 2.0)
    assert "7 steps, reconstruction at guidance 3: latent error" in report


def stock_euler(model, noise, steps, positive, negative, guidance):
    """The host's own sampler from inverted noise, as KSampler Advanced with noise disabled runs it."""
    sampler = comfy.samplers.KSampler(model, steps, torch.device("cpu"), "euler", "normal")
    return sampler.sample(torch.zeros_like(noise), positive, negative, guidance, latent_image=noise, disable_pbar=True)


@pytest.mark.parametrize(
    ("family", "prediction", "zsnr"),
    [("sd15", "EPS", False), ("sd15", "V_PREDICTION", False), ("sd15", "V_PREDICTION", True), ("sdxl", "EPS", False)],
)
def test_the_stock_sampler_rebuilds_the_picture_from_the_noise(family, prediction, zsnr):
    model, latent = tiny_models.unet(family, prediction, zsnr), tiny_models.latent()
    positive, negative = tiny_models.prompt(1, family=family), tiny_models.prompt(2, family=family)
    trajectory, noise, rebuilt, report, _ = invert(model, latent, family, steps=20, negative=negative)
    again = stock_euler(model, noise["samples"], 20, positive, negative, 1.0)
    wanted = latent["samples"]
    torch.testing.assert_close(again, rebuilt["samples"], rtol=1e-4, atol=1e-4)
    assert (again - wanted).norm() / wanted.norm() < 0.1
    assert trajectory.latents.shape == (21, 1, 4, 8, 8)
    assert "reconstruction at guidance 1" in report


def test_the_trajectory_runs_from_noise_to_the_picture_itself():
    model, latent = tiny_models.unet(), tiny_models.latent()
    trajectory, noise, *_ = invert(model, latent)
    assert trajectory.sigmas[-1] == 0.0
    assert list(trajectory.sigmas) == sorted(trajectory.sigmas, reverse=True)
    torch.testing.assert_close(trajectory.latents[-1], model.model.process_latent_in(latent["samples"]))
    torch.testing.assert_close(model.model.process_latent_in(noise["samples"]), trajectory.latents[0])


def test_asking_at_the_next_level_reconstructs_better():
    model, latent = tiny_models.unet(), tiny_models.latent()
    error = {}
    for where in (inversion.NEXT_LEVEL, inversion.CURRENT_LEVEL):
        rebuilt = invert(model, latent, predict_at=where, steps=12)[2]["samples"]
        error[where] = (rebuilt - latent["samples"]).norm()
    assert error[inversion.NEXT_LEVEL] < error[inversion.CURRENT_LEVEL]


def test_guidance_1_costs_one_row_and_one_call_a_step():
    model, rows = tiny_models.unet(), []

    def count(executor, x, *args, **kwargs):
        rows.append(x.shape[0])
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    invert(model, tiny_models.latent(), reconstruction_guidance=0.0)
    assert rows == [1] * STEPS
    rows.clear()
    invert(model, tiny_models.latent(), reconstruction_guidance=0.0, guidance=3.0, negative=tiny_models.prompt(2))
    assert rows == [2] * STEPS


def test_a_batch_is_its_pictures_one_by_one():
    model, batch = tiny_models.unet(), tiny_models.latent(3)
    together = invert(model, batch, reconstruction_guidance=0.0)[0].latents
    for i in range(3):
        alone = invert(model, {"samples": batch["samples"][i : i + 1]}, reconstruction_guidance=0.0)[0].latents
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (7, 9), (5, 16)])
def test_odd_sizes(height, width):
    trajectory = invert(tiny_models.unet(), tiny_models.latent(1, height, width))[0]
    assert trajectory.latents.shape[-2:] == (height, width)


def test_inputs_stay_as_they_were_and_other_nodes_patches_act():
    model, latent, calls = tiny_models.unet(), tiny_models.latent(), []
    before = latent["samples"].clone()
    patched = model.clone()
    patched.set_model_attn1_patch(lambda n, context, value, options: (calls.append(1), (n, context, value))[1])
    invert(patched, latent, reconstruction_guidance=0.0)
    assert calls
    assert torch.equal(latent["samples"], before)
    assert not model.model_options["transformer_options"].get("patches")


def test_a_mask_is_left_out_and_said_so():
    latent = tiny_models.latent() | {"noise_mask": torch.ones(1, 64, 64)}
    _, noise, rebuilt, report, _ = invert(tiny_models.unet(), latent)
    assert "mask was left out" in report
    assert "noise_mask" not in noise
    assert "noise_mask" not in rebuilt


def test_the_smallest_schedule_is_one_step():
    assert invert(tiny_models.unet(), tiny_models.latent(), sigmas=torch.tensor([5.0, 0.0]))[0].steps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": torch.tensor([])}, "0 steps"),
        ({"sigmas": torch.tensor([0.0])}, "0 steps"),
        ({"sigmas": torch.tensor([0.0, 1.0, 5.0])}, "fall from noisy to clean"),
        ({"sigmas": torch.tensor([5.0, float("nan"), 0.0])}, "sigmas holds NaN or infinite"),
        ({"sigmas": torch.tensor([5.0, 1.0])}, "end it at 0"),
        ({"guidance": 7.5}, "needs the negative prompt"),
        ({"reconstruction_guidance": 7.5}, "needs the negative prompt"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_way_out(changes, message):
    with pytest.raises(ValueError, match=message):
        invert(tiny_models.unet(), tiny_models.latent(), **changes)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(1, 4, 8, 8), "empty"),
        (torch.full((1, 4, 8, 8), float("nan")), "NaN"),
        (torch.ones(1, 16, 8, 8), "4 latent channels"),
        (torch.ones(1, 4, 2, 8, 8), "4 latent channels"),
    ],
)
def test_latents_that_are_no_picture_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        invert(tiny_models.unet(), {"samples": samples})


def test_other_model_families_are_refused_by_name():
    class Cosmos(torch.nn.Module):
        diffusion_model = torch.nn.Linear(1, 1)
        model_sampling = comfy.model_sampling.COSMOS_RFLOW()

    other = comfy.model_patcher.ModelPatcher(Cosmos(), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"flow-matching models.*Cosmos samples on another path"):
        invert(other, tiny_models.latent())
