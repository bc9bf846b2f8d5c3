"""Tune KV in the host: reconstruction, restoration, ways to tune, refusals."""

import comfy.model_management
import harness
import pytest
import tiny_models
import torch
from kv.runs import GUIDANCE, STEPS, apply, prompts, record, sample, start, tune
from palimpsest.nodes.kv import auto, tuning
from palimpsest.nodes.kv.embeddings import LEARNED
from palimpsest.nodes.kv.nodes import TuneKV
from palimpsest.nodes.kv.settings import CONDITIONAL, WEIGHTS, TuneSettings

pytestmark = pytest.mark.usefixtures("inference")


@pytest.mark.parametrize(
    ("family", "prediction", "zsnr"), [("sd15", "EPS", False), ("sd15", "V_PREDICTION", True), ("sdxl", "EPS", False)]
)
def test_tuning_rebuilds_the_picture_better_than_ddim(family, prediction, zsnr):
    model, latent = tiny_models.unet(family, prediction, zsnr), tiny_models.latent()
    trajectory = record(model, latent, family)
    plain = sample(model, start(model, trajectory), family=family)
    _, rebuilt, report = tune(model, trajectory, family, inner_steps=16, learning_rate=0.1)
    wanted = latent["samples"]
    assert (rebuilt - wanted).norm() < 0.7 * (plain - wanted).norm()
    assert "rebuilt at guidance 3" in report


def test_the_stock_sampler_with_the_embeddings_rebuilds_it_too(tuned):
    model, _, trajectory, kv, rebuilt = tuned
    again = sample(apply(model, kv), start(model, trajectory))
    torch.testing.assert_close(again, rebuilt, rtol=2e-2, atol=2e-2)  # the embeddings are stored in half precision


def test_the_model_is_left_as_it_was(tuned):
    model = tiny_models.unet()
    latent = tiny_models.latent()
    trajectory = record(model, latent)
    weights = {name: (p.data_ptr(), p.clone(), p.requires_grad) for name, p in model.model.named_parameters()}
    before = sample(model, start(model, trajectory))
    tune(model, trajectory)
    assert torch.equal(sample(model, start(model, trajectory)), before)
    for name, p in model.model.named_parameters():
        assert p.data_ptr() == weights[name][0]
        assert torch.equal(p, weights[name][1])
        assert p.requires_grad == weights[name][2]
        assert p.grad is None
    assert not any(getattr(m, "weight_function", []) for m in model.model.modules())
    assert not model.model_options["transformer_options"].get("patches_replace")


def test_cancelling_leaves_the_model_as_it_was(monkeypatch):
    model, latent = tiny_models.unet(), tiny_models.latent()
    trajectory = record(model, latent)
    before, calls = sample(model, start(model, trajectory)), []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tune(model, trajectory)
    monkeypatch.undo()
    assert torch.equal(sample(model, start(model, trajectory)), before)
    assert torch.is_inference_mode_enabled()


def test_pictures_of_a_batch_are_tuned_each_on_their_own():
    model, batch = tiny_models.unet(), tiny_models.latent(2)
    trajectory = record(model, batch)
    kv, rebuilt, _ = tune(model, trajectory)
    assert kv.pictures == 2
    for i in range(2):
        alone = tune(model, record(model, {"samples": batch["samples"][i : i + 1]}))[1]
        torch.testing.assert_close(rebuilt[i : i + 1], alone, rtol=1e-2, atol=1e-2)
    again = sample(apply(model, kv), start(model, trajectory))
    torch.testing.assert_close(again, rebuilt, rtol=2e-2, atol=2e-2)


def test_early_steps_and_other_blocks_are_left_alone():
    model = tiny_models.unet()
    kv = tune(model, record(model, tiny_models.latent()), start_percent=0.5, layers="middle")[0]
    assert [step is None for step in kv.learned] == [True, True, False, False]
    assert {layer.block for layer in kv.layers} == {"middle"}
    assert kv.scalars.shape == (STEPS, 1, 4, 1)


def test_no_iterations_are_plain_ddim():
    model = tiny_models.unet()
    trajectory = record(model, tiny_models.latent())
    kv, rebuilt = tuning.tune(model, trajectory, *prompts(), TuneSettings(guidance=GUIDANCE, inner_steps=0))
    torch.testing.assert_close(rebuilt, sample(model, start(model, trajectory)), rtol=1e-4, atol=1e-4)
    assert kv.info["iterations"] == 0


def test_prompt_only_tuning_rebuilds_at_guidance_1():
    model, latent = tiny_models.unet(), tiny_models.latent()
    trajectory = record(model, latent)
    plain = sample(model, start(model, trajectory), guidance=1.0)
    kv, rebuilt, _ = tune(model, trajectory, tune_with=CONDITIONAL, inner_steps=8)
    assert (rebuilt - latent["samples"]).norm() < (plain - latent["samples"]).norm()
    assert kv.info["guidance"] == 1.0


@pytest.mark.parametrize("learned", [{}, {"inner_steps": 0}])
def test_of_several_prompts_at_once_the_same_is_recorded_whatever_the_memory(learned, monkeypatch):
    model = tiny_models.unet()
    trajectory, first = record(model, tiny_models.latent()), prompts()[0]
    both = [*first, *tiny_models.prompt(5)]

    def recorded():
        return harness.tune(model, trajectory, both, **learned)[0]

    in_one_call = recorded()
    monkeypatch.setattr(type(model), "get_free_memory", lambda *_: 0)
    in_many = recorded()
    for one, other in zip(in_one_call.source, in_many.source, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3)  # half precision


def test_a_high_tolerance_stops_at_once():
    model = tiny_models.unet()
    kv = tune(model, record(model, tiny_models.latent()), tolerance=1.0)[0]
    assert kv.info["iterations"] == 0


def test_weights_in_bfloat16():
    model = tiny_models.unet(dtype=torch.bfloat16)
    latent = tiny_models.latent()
    trajectory = record(model, latent)
    plain = sample(model, start(model, trajectory))
    _, rebuilt, _ = tune(model, trajectory, inner_steps=8)
    assert (rebuilt - latent["samples"]).norm() < (plain - latent["samples"]).norm()


def test_prompts_of_different_lengths():
    model, latent = tiny_models.unet(), tiny_models.latent()
    long = tiny_models.prompt(2, tokens=40)  # 7 and 40 tokens cannot be joined: cond and uncond run apart
    trajectory = record(model, latent)
    plain = sample(model, start(model, trajectory), negative=long)
    kv, rebuilt, _ = tune(model, trajectory, negative=long, inner_steps=8)
    assert (rebuilt - latent["samples"]).norm() < (plain - latent["samples"]).norm()
    again = sample(apply(model, kv), start(model, trajectory), negative=long)
    torch.testing.assert_close(again, rebuilt, rtol=2e-2, atol=2e-2)


def test_tuning_refuses_what_it_cannot_do(tuned):
    _, _, trajectory, *_ = tuned
    with pytest.raises(ValueError, match="another model architecture"):
        tune(tiny_models.unet("sdxl"), trajectory, "sdxl")
    with pytest.raises(ValueError, match=r"start_percent 0\.95 and end_percent 1 leave none of 4 steps"):
        tune(tiny_models.unet(), trajectory, start_percent=0.95)
    broken = tiny_models.unet()
    broken.set_model_unet_function_wrapper(
        lambda network, given: network(given["input"], given["timestep"], **given["c"]) * torch.nan
    )
    with pytest.raises(ValueError, match="NaN at step 1"):
        tune(broken, trajectory)
    limited = [[tiny_models.prompt(1)[0][0], {"area": (4, 4, 0, 0), "strength": 1.0}]]
    with pytest.raises(ValueError, match="limited to an area"):
        tune(tiny_models.unet(), trajectory, negative=limited)
    with pytest.raises(ValueError, match="needs the negative prompt"):
        tiny_models.execute(TuneKV, model=tiny_models.unet(), trajectory=trajectory, positive=tiny_models.prompt())


# ---- ways to tune


def errors(model, trajectory, latent, **changes):
    """(error of the reconstruction, error when the stock sampler uses the embeddings, kv)."""
    kv, rebuilt, _ = tune(model, trajectory, inner_steps=12, learning_rate=0.1, **changes)
    assert bool((kv.scalars[:, :, 1::2] == 1.0).all()) == ("keyframes" not in changes and "learn" not in changes)
    again = sample(apply(model, kv), start(model, trajectory))
    return *((x - latent["samples"]).norm().item() for x in (rebuilt, again)), kv


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 4}, {"keyframes": 2}, {"keyframes": 3, "rank": 4}, {"batch_steps": 2}, {"batch_steps": 3, "rank": 4},
        {"learn": WEIGHTS}, {"end_percent": 0.75}, {"start_percent": 0.25, "end_percent": 0.75}, {"keep_source": False},
        {"keep_source": False, "batch_steps": 4, "warm_start": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_way_of_tuning_rebuilds_better_than_ddim(tuned, changes):
    model, latent, trajectory, *_ = tuned
    plain = (sample(model, start(model, trajectory)) - latent["samples"]).norm().item()
    rebuilt, again, kv = errors(model, trajectory, latent, **changes)
    assert rebuilt < plain * (1.0 if changes.get("learn") == WEIGHTS else 0.97)  # four weights a layer do little
    assert again == pytest.approx(rebuilt, rel=0.05)
    assert kv.keeps_source == changes.get("keep_source", True)


def test_ranks_and_keyframes_are_smaller(tuned):
    model, _, trajectory, full, _ = tuned
    sizes = {}
    for changes in ({"rank": 2}, {"keyframes": 3}, {"learn": WEIGHTS}):
        kv = tune(model, trajectory, inner_steps=1, **changes)[0]
        sizes[str(changes)] = kv.bytes / full.bytes
    assert list(sizes.values()) == pytest.approx([0.22, 0.5, 0.333], abs=0.06)


def test_only_weights_can_be_learned(tuned):
    model, _, trajectory, *_ = tuned
    kv = tune(model, trajectory, learn=WEIGHTS)[0]
    assert kv.weights_only
    layer = kv.step(0, kv.pieces(0, [LEARNED]), torch.device("cpu"), torch.float32)[kv.layers[0].key]
    layer = layer.projected(torch.nn.Identity(), torch.neg)
    assert torch.equal(layer.k_hat, layer.source)
    assert torch.equal(layer.v_hat, -layer.source)
    assert abs(float(layer.gamma_k)) > 0


def test_a_tuning_mask_learns_only_what_is_white():
    model, latent = tiny_models.unet(), tiny_models.latent()
    trajectory = record(model, latent)
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    kv, rebuilt, _ = tune(model, trajectory, mask=mask, inner_steps=12, learning_rate=0.1)
    plain = sample(model, start(model, trajectory))
    gain = (plain - latent["samples"]).abs() - (rebuilt - latent["samples"]).abs()
    assert gain[..., :4].mean() > 2 * gain[..., 4:].mean()
    layer = max(kv.layers, key=lambda layer: layer.tokens)
    found = kv.step(0, kv.pieces(0, [LEARNED]), torch.device("cpu"), torch.float32)[layer.key]
    grid = found.k_hat.unflatten(1, (layer.height, layer.width))
    assert grid[:, :, layer.width // 2 :].abs().max() == 0
    assert grid[:, :, : layer.width // 2].abs().max() > 0
    with pytest.raises(ValueError, match="mask of Tune KV is black"):
        tune(model, trajectory, mask=torch.zeros(1, 8, 8))


def test_auto_chooses_layers_and_says_so(tuned):
    model, _, trajectory, *_ = tuned
    kv, _, report = tune(model, trajectory, auto_layers=True, layers="middle", inner_steps=2)
    assert kv.info["layers"] in auto.CANDIDATE_LAYERS
    assert f"auto took {kv.info['layers']} from {kv.info['start_percent']:g}" in report
    assert report.count("layout") == len(auto.CANDIDATE_LAYERS) * len(auto.STARTS)
