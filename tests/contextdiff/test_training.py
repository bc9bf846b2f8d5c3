"""Train Context Adapter in the host: what it learns, what it leaves alone, cancelling, NaN, and what is refused."""

import dataclasses
import functools
import itertools
import math

import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import harness
import pytest
import tiny_models
import tiny_transformers
import torch
from benchmarks import counting
from comfy.ldm.modules.attention import attention_pytorch
from comfy_extras.nodes_train import LoraModelLoader
from contextdiff.acting import flow, use_folder
from palimpsest.kernels import contextdiff
from palimpsest.nodes import files as storage
from palimpsest.nodes import training
from palimpsest.nodes.contextdiff import files as context_files
from palimpsest.nodes.contextdiff import network as context_network
from palimpsest.nodes.contextdiff import objective as context_objective
from palimpsest.nodes.contextdiff import train_node
from palimpsest.nodes.contextdiff import training as context_training
from palimpsest.nodes.contextdiff import validation as context_validation
from palimpsest.nodes.contextdiff.adapter import ContextAdapter, describe
from palimpsest.nodes.contextdiff.fit import FitAdapter, TrainSettings
from palimpsest.nodes.contextdiff.network import AdapterConfig
from palimpsest.nodes.contextdiff.nodes import ContextSampler
from palimpsest.nodes.contextdiff.objective import Objective
from palimpsest.nodes.contextdiff.train_node import TrainContextAdapter
from palimpsest.nodes.contextdiff.validation import Validator
from palimpsest.nodes.host import checkpointing

import nodes

STEPS = 4
JOINT = "LoRA on to_q"

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module", autouse=True)
def _shared():
    """What tests share is gone with the module."""
    yield
    for made in (unet, plain, three_pictures, joint):
        made.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/palimpsest_context."""
    return use_folder(monkeypatch, tmp_path, loras=([str(tmp_path / "loras")], {".safetensors"}))


def prompts(count, family="sd15", tokens=7):
    """One prompt for each of several pictures."""
    return [entry for seed in range(count) for entry in tiny_models.prompt(seed + 1, tokens, family)]


def train(model=None, pictures=1, family="sd15", whole=False, **settings):
    """The node's outputs on smooth pictures after a few steps; validated at fewer levels than usual, or as `whole`."""
    chosen = {
        "model": unet(family) if model is None else model,
        "latent": tiny_models.latent(pictures),
        "positive": tiny_models.prompt(1, family=family),
        "steps": STEPS,
        "validate_every": 0,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "rescue_filename": "",
    }
    with pytest.MonkeyPatch.context() as patch:
        if not whole:
            patch.setattr(context_validation, "PROBE_LEVELS", 2)
            patch.setattr(context_validation, "SAMPLED_STEPS", 2)
        return tiny_models.execute(TrainContextAdapter, **chosen | settings)


@functools.cache
def unet(family="sd15"):
    """A model that trainings share: they leave it as it was."""
    return tiny_models.unet(family)


@functools.cache
def plain():
    """A training that several tests look at."""
    return train()


@functools.cache
def three_pictures(seed=0):
    """A training on several pictures, with a prompt each."""
    return train(pictures=3, positive=prompts(3), seed=seed, steps=2)[0]


@dataclasses.dataclass
class Joint:
    """A training beside a LoRA, with what it was given, before and after."""

    model: object
    given: dict
    before: dict
    after: dict
    adapter: object
    lora: dict
    draw: object
    predicted: torch.Tensor


@functools.cache
def joint(family):
    """A joint training that several tests look at, with the last prediction of its validation."""
    model, noted = tiny_models.unet(family), {}
    given = {"latent": tiny_models.latent(2), "positive": tiny_models.prompt(1, family=family)}
    measure = Validator.measure

    def note(self, step):
        noted["draw"] = draw = self.probes[1][0]
        with torch.no_grad():
            noted["predicted"] = self.objective.predict(draw, draw.plain())
        return measure(self, step)

    before = everything(model, family, given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "measure", note)
        adapter, _, _, lora = train(model, 2, family, train_unet=JOINT, steps=6, **given)
    return Joint(model, given, before, everything(model, family, given), adapter, lora, **noted)


def everything(model, family, given):
    """Copies of all that a training is given, and what the model draws."""
    found = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    text, extra = given["positive"][0]
    found |= {"picture": picture(model, family), "latent": given["latent"]["samples"].clone(), "text": text.clone()}
    return found | {name: tensor.clone() for name, tensor in extra.items()}


def timid(model):
    """A model that predicts too little of the picture at high noise, as every denoiser does: r can help it."""
    return predicting(model, lambda sigma: 1 / (1 + sigma**2))


def predicting(model, share):
    """A model that predicts a share of the picture, by the noise level, in its network: guidance is left out."""

    def less(apply_model, given):
        x, level = given["input"], given["timestep"]
        return apply_model(x, level, **given["c"]) * share(level.view(-1, *[1] * (x.ndim - 1)))

    model = model.clone()
    model.set_model_unet_function_wrapper(less)
    return model


def weights(adapter):
    return torch.cat([tensor.flatten() for tensor in adapter.weights().values()])


def picture(model, family="sd15", sampler=None):
    """A picture sampled from seeded noise."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_models.prompt(1, family=family), tiny_models.prompt(2, family=family))
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sampler = sampler or comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=5)


# ---- what it learns


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("train_on", context_objective.SEEN)
def test_the_loss_falls_and_the_adapter_acts_in_sampling(family, train_on):
    model = timid(tiny_models.unet(family))
    adapter, plot, report, lora = train(model, 2, family, True, train_on=train_on, steps=12, learning_rate=3e-3)
    seen = "loss_x0" if train_on == "x0" else "loss_x0_hat"
    assert adapter.info[seen] < 0.99
    ours = tiny_models.execute(ContextSampler, context_adapter=adapter)[0]
    stock = picture(model, family)
    assert (picture(model, family, ours) - stock).norm() > 1e-4 * stock.norm()
    assert plot.shape[0] == 1
    assert plot.shape[-1] == 3
    assert plot.std() > 0.05
    assert "12 steps" in report
    assert lora == {}


@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION"])
def test_the_gradient_through_the_u_net_is_the_finite_difference(prediction):
    """Of eq. 6 for one draw, from the loss as the training computes it."""
    model = tiny_models.unet(prediction=prediction)
    values = differences(model, tiny_models.latent(2)["samples"], tiny_models.prompt(1))
    assert values["gradient"] == pytest.approx(values["difference"], rel=2e-2)
    assert abs(values["gradient"]) > 1e-4


def differences(model, latents, positive):
    """The gradient of eq. 6 in one direction of the weights, and the finite difference."""
    values = {}

    class Measuring(FitAdapter):
        def __call__(self, model, x, sigmas, extra_args, callback, disable=False, **_):
            objective = self.objective(model, x, extra_args)
            draw = objective.draw([0, 1], [0.3, 0.6], torch.Generator().manual_seed(0))
            generator = torch.Generator().manual_seed(1)
            weight = self.network.out.weight
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
            direction = torch.randn(weight.shape, generator=generator)
            loss = objective.losses(draw, draw.clean)[0].sum()
            loss.backward()
            values["gradient"] = float((weight.grad * direction).sum())
            with torch.no_grad():
                weight += 1e-3 * direction
                up = objective.losses(draw, draw.clean)[0].double().sum()
                weight -= 2e-3 * direction
                values["difference"] = float((up - objective.losses(draw, draw.clean)[0].double().sum()) / 2e-3)
            return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_training, "FitAdapter", Measuring)
        settings = TrainSettings(batch_size=2)
        context_training.train(model, latents, positive, settings)
    return values


def test_the_loss_is_equation_6_by_hand():
    """Of an untrained adapter: lambda |f(x_0 + sigma eps) - x_0|^2 with the host's own prediction."""
    model, found = unet(), {}
    measure = Validator.measure

    def note(self, step):
        objective = self.objective
        draw = objective.draw([0, 1], [0.2, 0.7], torch.Generator().manual_seed(9))
        x, sigmas = draw.clean + draw.column() * draw.noise, draw.column()[:, 0, 0, 0]
        text = tiny_models.prompt(1)[0][0].expand(2, -1, -1)
        with torch.no_grad():
            clean = model.model.apply_model(x, sigmas, c_crossattn=text)
            network = context_network.build(objective.network.config)
            context_network.initialise(network, 0)
            found["ours"] = dataclasses.replace(objective, network=network).losses(draw, draw.clean)[0].tolist()
        errors = (clean - draw.clean).pow(2).flatten(1).mean(1).tolist()
        found["by hand"] = [min(s**-2, 5.0) * error for s, error in zip(draw.sigmas, errors, strict=True)]
        return measure(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "measure", note)
        train(model, 2, steps=1)
    assert found["ours"] == pytest.approx(found["by hand"], rel=1e-4)


def test_the_two_formulas_noise_as_the_paper_and_as_the_released_code():
    clean, r, noise = torch.randn(3, 2, 4, 8, 8).unbind(0)
    draw = context_objective.Draw([0, 1], clean, torch.zeros(2, 7, 24), (1.5, 14.0), noise)
    found = context_objective.FORWARD["paper"](draw, r, 14.0)
    torch.testing.assert_close(found[0], clean[0] + contextdiff.bias_level(1.5) * r[0] + 1.5 * noise[0])
    torch.testing.assert_close(found[1], clean[1] + 14.0 * noise[1])
    found = context_objective.FORWARD["released code"](draw, r, 14.0)
    torch.testing.assert_close(found[1], clean[1] + 14.0 * (noise[1] + 0.018125 * r[1]))


def test_the_same_seed_gives_the_same_adapter_and_another_does_not():
    again = train(pictures=3, positive=prompts(3), seed=0, steps=2)[0]
    one, same, other = (weights(adapter) for adapter in (three_pictures(), again, three_pictures(1)))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_training_goes_on_from_an_adapter_and_leaves_it_as_it_was():
    first = plain()[0]
    before = weights(first).clone()
    second = train(context_adapter=first, size="large", seed=5)[0]
    assert torch.equal(weights(first), before)
    assert second.config == first.config
    assert not torch.equal(weights(second), before)
    assert (first.info["steps"], second.info["steps"]) == (STEPS, 2 * STEPS)


def test_a_clip_trains_a_video_adapter_on_frames_in_a_row(monkeypatch):
    seen = []
    draw = Objective.draw

    def note(self, rows, shares, generator):
        seen.append((rows, shares))
        return draw(self, rows, shares, generator)

    monkeypatch.setattr(Objective, "draw", note)
    adapter, *_ = train(pictures=5, video=True, batch_size=3, positive=prompts(5))
    assert adapter.config.video
    assert all(rows == list(range(rows[0], rows[0] + 3)) for rows, _ in seen)
    assert all(len(set(shares)) == 1 for _, shares in seen)


def test_every_picture_comes_once_before_any_comes_again(monkeypatch):
    seen = []
    step = FitAdapter.step

    def note(self, objective, number, rows, optimiser):
        seen.extend(rows)
        step(self, objective, number, rows, optimiser)

    monkeypatch.setattr(FitAdapter, "step", note)
    train(pictures=5, steps=5, batch_size=2)
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))


# ---- prompts of several pictures


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_each_picture_is_predicted_with_its_own_prompt(family):
    """The rows that the U-Net gets are those of the pictures of the step, in their order."""
    given, wanted = [], []
    texts = prompts(3, family)

    def watch(apply_model, arguments):
        context = arguments["c"]["c_crossattn"]
        given.append((context.clone(), arguments["c"].get("y")))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = tiny_models.unet(family)
    model.set_model_unet_function_wrapper(watch)
    predict = Objective.predict

    def note(self, draw, x):
        found = predict(self, draw, x)
        wanted.append(torch.cat([texts[row][0] for row in draw.rows]))
        torch.testing.assert_close(draw.text, wanted[-1])
        torch.testing.assert_close(given[-1][0], wanted[-1])
        if family == "sdxl":
            pooled = torch.cat([texts[row][1]["pooled_output"] for row in draw.rows])
            torch.testing.assert_close(given[-1][1][:, :1280], pooled)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "predict", note)
        train(model, 3, family, positive=texts)
    assert len(wanted) > STEPS


def test_one_prompt_with_a_row_for_each_picture_is_the_same_as_several():
    batched = [[torch.cat([text for text, _ in prompts(3)]), {}]]
    assert torch.equal(weights(train(pictures=3, positive=batched, steps=2)[0]), weights(three_pictures()))


def test_prompts_of_other_lengths_are_joined_as_the_host_joins_them():
    mixed = tiny_models.prompt(1) + tiny_models.prompt(2, 14)
    ((text, _),) = training.one_prompt_per_picture(mixed, 2)
    torch.testing.assert_close(text[0], mixed[0][0][0].repeat(2, 1))
    torch.testing.assert_close(text[1], mixed[1][0][0])


def test_a_prompt_is_not_changed_by_joining():
    several = prompts(2, "sdxl")
    before = several[0][1]["pooled_output"]
    training.one_prompt_per_picture(several, 2)
    assert several[0][1]["pooled_output"] is before


# ---- what it leaves alone


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_frozen_model_and_the_inputs_stay_as_they_were(family):
    model = tiny_models.unet(family)
    given = {"latent": tiny_models.latent(2), "positive": tiny_models.prompt(1, family=family)}
    before = everything(model, family, given)
    train(model, 2, family, **given)
    assert_same(everything(model, family, given), before)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_model_with_a_trained_lora_and_the_inputs_stay_as_they_were(family):
    assert_same(joint(family).after, joint(family).before)


def assert_same(after, before):
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_an_odd_size_and_an_empty_picture_train():
    for latent in ({"samples": torch.zeros(1, 4, 8, 8)}, tiny_models.latent(2, 7, 9)):
        adapter = train(latent=latent, pictures=len(latent["samples"]))[0]
        assert torch.isfinite(weights(adapter)).all()


def test_a_lora_on_the_model_and_patches_of_other_nodes_act_while_training():
    model, calls = tiny_models.unet(), []
    patched = comfy.sd.load_lora_for_models(model, None, tiny_models.lora(model), 1.0, 0.0)[0]
    patched.set_model_attn1_patch(lambda n, context, value, options: (calls.append(1), (n, context, value))[1])
    other = train(patched)[0]
    assert calls
    assert not torch.equal(weights(plain()[0]), weights(other))


def test_the_guidance_of_other_nodes_does_not_act_while_training():
    adapter, _, report, *_ = train(harness.guided(unet()))
    assert torch.equal(weights(adapter), weights(plain()[0]))
    assert "left out (PerturbedAttentionGuidance)" in report


def test_half_precision_weights_train():
    adapter = train(tiny_models.unet(dtype=torch.bfloat16))[0]
    assert torch.isfinite(weights(adapter)).all()
    assert adapter.weights()["out.weight"].abs().max() > 0


# ---- the joint LoRA


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_lora_is_what_the_hosts_loader_takes_and_changes_the_queries(family):
    model, adapter, lora = joint(family).model, joint(family).adapter, joint(family).lora
    names = [name for name, _ in model.model.diffusion_model.named_modules() if name.endswith(".to_q")]
    assert len(lora) == 3 * len(names)
    assert all(lora[f"lora_unet_{name.replace('.', '_')}.lora_up.weight"].abs().max() > 0 for name in names)
    loaded = tiny_models.execute(LoraModelLoader, model=model, lora=lora, strength_model=1.0)[0]
    assert len(loaded.patches) == len(names)
    assert not torch.equal(picture(loaded, family), picture(model, family))
    assert adapter.info["train_unet"] == JOINT


def test_the_prediction_with_the_trained_lora_is_that_of_the_loaded_one():
    model, draw, ours = joint("sd15").model, joint("sd15").draw, joint("sd15").predicted
    loaded = comfy.sd.load_lora_for_models(model, None, joint("sd15").lora, 1.0, 0.0)[0]

    def predicted(patched):
        comfy.model_management.load_models_gpu([patched])
        text = tiny_models.prompt(1)[0][0].expand(2, -1, -1)
        return patched.model.apply_model(draw.plain(), draw.column()[:, 0, 0, 0], c_crossattn=text)

    found = predicted(loaded)
    torch.testing.assert_close(ours, found, rtol=1e-4, atol=1e-4)
    unlike = predicted(model)  # the LoRA acts at all
    assert (found - unlike).norm() > 1e-5 * unlike.norm()


def test_a_frozen_u_net_gives_a_lora_without_effect():
    model = unet()
    loaded = tiny_models.execute(LoraModelLoader, model=model, lora=plain()[3], strength_model=1.0)[0]
    assert torch.equal(picture(loaded), picture(model))


# ---- validation and the leak check


def test_an_untrained_adapter_is_measured_as_no_gain():
    adapter = train(learning_rate=1e-7, steps=1, whole=True)[0]
    for name in ("loss_x0", "loss_x0_hat", "sampled"):
        assert adapter.info[name] == pytest.approx(1.0, abs=1e-4)


def test_validation_comes_every_so_many_steps_and_does_not_change_what_is_learned():
    found = []
    for every in (0, 2):
        settings = TrainSettings(steps=5, validate_every=every, learning_rate=1e-2)
        found.append(context_training.train(unet(), tiny_models.latent()["samples"], tiny_models.prompt(1), settings))
    without, often = found
    assert torch.equal(weights(without.adapter), weights(often.adapter))
    assert [v.step for v in without.history.validations] == [5]
    assert [v.step for v in often.history.validations] == [2, 4, 5]


def test_what_validation_samples_begins_without_a_bias():
    """The context-aware sampler from the noised picture, strength 0, is the stock sampler on the same levels."""
    model, found = tiny_models.unet(), {}
    sampled = Validator.sampled

    def note(self, strength):
        error, pictures = sampled(self, strength)
        if not strength:
            share = [0.25 + 0.75 * i / 10 for i in range(11)]
            objective = self.objective
            levels = torch.tensor([float(objective.sampling.percent_to_sigma(s)) for s in share])
            draw = objective.draw([0], share[:1], training.generator(self.seed + 2))
            x, guider = draw.plain(), objective.model.inner_model
            for s, s_next in itertools.pairwise(levels):
                text = guider.conds["positive"][0]["cross_attn"]
                with torch.no_grad():
                    clean = guider.inner_model.apply_model(x, s[None], c_crossattn=text)
                x = x + (x - clean) / s * (s_next - s)
            found["error"], found["by hand"] = error, float((x - draw.clean).pow(2).mean())
        return error, pictures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "sampled", note)
        train(model, steps=1, whole=True)
    assert found["error"] == pytest.approx(found["by hand"], rel=1e-3)


@pytest.mark.parametrize(
    ("trained", "errors", "words"),
    [
        (("paper", "x0", True), (0.6, 0.9, 1.1), "a leak"),
        (("paper", "x0", True), (0.6, 0.95, 0.98), "partly a leak"),
        (("paper", "x0_hat", True), (0.9, 0.9, 0.9), "no leak"),
        (("paper", "x0_hat", True), (0.5, 0.9999, 0.9), "little was learned"),
        (("released code", "x0_hat", True), (0.9, 0.9, 1.0), "samples plainly"),
        (("released code", "x0_hat", False), (0.9, 0.9, 0.9), "no leak"),
    ],
)
def test_the_leak_check_says_what_was_found(trained, errors, words):
    assert words in context_validation.verdict(*trained, context_validation.Validation(10, *errors))


def test_the_released_code_leaves_sampling_as_it_was():
    adapter, _, report, _ = train(formula="released code", steps=6, whole=True)
    assert adapter.info["formula"] == "released code"
    assert adapter.info["sampled"] == 1.0
    assert "samples plainly" in report


def test_a_trained_adapter_is_saved_and_loaded_with_what_training_says(folder):
    adapter = train(seed=0xFFFFFFFFFFFFFFFF)[0]
    path = context_files.SHELF.new_path("mine")
    context_files.save_adapter(adapter, path)
    again = context_files.load_adapter(str(path))
    assert again.info == adapter.info
    assert "formula paper" in describe(again)


# ---- when it does not end well


def cancel_after(steps, monkeypatch):
    """Press cancel in step number `steps`."""
    take, count = FitAdapter.step, []

    def step(self, objective, number, *rest):
        count.append(number)
        comfy.model_management.interrupt_current_processing(number == steps)
        return take(self, objective, number, *rest)

    monkeypatch.setattr(FitAdapter, "step", step)
    return count


def test_cancelling_keeps_what_was_learned_and_leaves_the_model_alone(folder, monkeypatch):
    model = unet()
    before = picture(model)
    count = cancel_after(3, monkeypatch)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, steps=50, rescue_filename="half done")
    assert len(count) <= 5
    (name,) = context_files.SHELF.listed()
    assert name == "half done_00001.safetensors"
    adapter = context_files.load_adapter(str(folder / name))
    assert 0 < adapter.info["steps"] <= 4
    assert adapter.weights()["out.weight"].abs().max() > 0
    assert torch.equal(picture(model), before)


def test_without_a_name_nothing_is_written_on_cancelling(folder, monkeypatch):
    cancel_after(2, monkeypatch)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(steps=50)
    assert [path.name for path in folder.iterdir()] == ["put_context_adapters_here"]


def test_running_out_of_memory_keeps_what_was_learned(folder, monkeypatch):
    step = FitAdapter.step

    def fail(self, objective, number, *rest):
        if number == 2:
            raise torch.OutOfMemoryError("no memory left")
        return step(self, objective, number, *rest)

    monkeypatch.setattr(FitAdapter, "step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train(steps=50, rescue_filename="so far")
    assert context_files.SHELF.listed() == ["so far_00001.safetensors"]


def test_an_adapter_and_its_lora_are_rescued_under_one_name_that_is_free_for_both(folder, monkeypatch):
    loras = folder.parent / "loras"
    loras.mkdir()
    (loras / "mine_00001.safetensors").write_bytes(b"EARLIER")
    cancel_after(3, monkeypatch)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(steps=50, rescue_filename="mine", train_unet=JOINT)
    assert context_files.SHELF.listed() == ["mine_00002.safetensors"]
    assert sorted(path.name for path in loras.iterdir()) == ["mine_00001.safetensors", "mine_00002.safetensors"]


def test_no_step_is_taken_where_nothing_could_be_rescued(folder, monkeypatch):
    count = cancel_after(99, monkeypatch)
    (folder / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        train(rescue_filename="file/mine")
    assert "Not a directory" in TrainContextAdapter.validate_inputs("file/mine")
    assert TrainContextAdapter.validate_inputs("  ") is True
    usage = storage.shutil.disk_usage(".")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match="the disk has 1 MB free"):
        train(rescue_filename="mine")
    assert count == []


def test_a_loss_that_is_no_number_stops_the_training_and_keeps_the_weights_before(monkeypatch):
    losses, good = Objective.losses, []

    def nan(self, draw, seen):
        found, denoised = losses(self, draw, seen)
        if torch.is_grad_enabled():
            if len(good) == 3:
                return found * math.nan, denoised
            good.append(torch.cat([p.detach().flatten() for p in self.network.parameters()]))
        return found, denoised

    monkeypatch.setattr(Objective, "losses", nan)
    adapter, _, report, _ = train(steps=20)
    assert "no number at step 4" in report
    assert torch.equal(torch.cat([p.flatten() for p in adapter.patcher.model.parameters()]), good[2])
    assert adapter.info["steps"] == 2


def test_a_model_that_returns_nan_from_the_start_is_told():
    model = tiny_models.unet()
    model.model.diffusion_model.out[2].bias.fill_(math.nan)
    with pytest.raises(ValueError, match="returns NaN"):
        train(model)


def test_a_lora_is_saved_beside_the_adapter_on_cancelling(folder, monkeypatch):
    cancel_after(3, monkeypatch)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder.parent / "loras")], set()))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(steps=50, rescue_filename="half done", train_unet=JOINT)
    model, (path,) = unet(), (folder.parent / "loras").iterdir()
    loaded = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)[0]
    assert len(loaded.patches) == sum(name.endswith(".to_q.weight") for name in model.model.state_dict())
    assert not torch.equal(picture(loaded), picture(model))


# ---- memory


@pytest.mark.parametrize("train_unet", ["frozen", JOINT])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_checkpointing_learns_the_same_and_patches_see_their_own_block(family, train_unet):
    """A patch that acts on one block: while blocks run again, the host's options name the last one."""
    model = tiny_models.unet(family)
    before = picture(model, family)
    patched = model.clone()
    patched.set_model_attn2_patch(
        lambda n, context, value, options: (n * 1.1 if options["block"] == ("input", 1) else n, context, value)
    )
    same = {"model": patched, "family": family, "train_unet": train_unet, "steps": 2, "learning_rate": 1e-3}
    (kept, *_, lora), (again, *_, other) = (train(**same, checkpointing=wanted) for wanted in (False, True))
    torch.testing.assert_close(weights(again), weights(kept), rtol=1e-4, atol=1e-6)
    assert all(torch.allclose(other[name], tensor, atol=1e-6) for name, tensor in lora.items())
    assert torch.equal(picture(model, family), before)


@pytest.mark.parametrize(
    ("family", "pixels", "gigabytes", "saving"), [("sd15-full", 512, 0.8, 0.2), ("sdxl-full", 1024, 5.3, 0.6)]
)
def test_the_memory_of_a_gradient_is_what_the_tooltips_say(family, pixels, gigabytes, saving, monkeypatch):
    """What autograd keeps of one picture's pass with a gradient into the latent only, in half precision."""
    monkeypatch.setattr("comfy.ldm.modules.attention.optimized_attention", attention_pytorch)
    kept, largest = kept_for_gradient(family, pixels // 8, lambda model: None)
    between, _ = kept_for_gradient(family, pixels // 8, checkpointing.install)
    assert kept == pytest.approx(gigabytes, rel=0.05)
    assert between + largest == pytest.approx(saving, abs=0.05)  # one block at a time is run again
    told = {entry.id: entry.tooltip for entry in TrainContextAdapter.define_schema().inputs}
    assert f"{gigabytes} GB" in told["model"]
    assert f"{saving} GB in place of {gigabytes}" in told["checkpointing"].replace(f"{saving} in", f"{saving} GB in")


def kept_for_gradient(family, size, prepare):
    """(all of it, the most that one block keeps) in GB, on the meta device."""
    layout, made, blocks = tiny_models.FAMILIES[family][2], {"device": "meta", "dtype": torch.float16}, [0]
    with torch.inference_mode(False):
        model = tiny_models.unet_without_weights(family)
        network = model.model.requires_grad_(False).diffusion_model
        prepare(model)
        model.patch_model(load_weights=False)
        x = torch.zeros(1, 4, size, size, **made, requires_grad=True)
        context, time = torch.zeros(1, 77, layout["context_dim"], **made), torch.zeros(1, device="meta")
        pooled = {"y": torch.zeros(1, 2816, **made)} if layout["adm_in_channels"] else {}
        with counting.OneAttention(), counting.counting(network) as counter:

            def now(*_):
                blocks.append(sum(storage.nbytes() for storage in counter.saved.values()))

            for block in checkpointing.blocks(network).values():
                block.register_forward_pre_hook(now)
                block.register_forward_hook(now)
            network(x * 1.0, time, context=context, transformer_options={}, **pooled)
    steps = (after - before for before, after in zip(blocks[1::2], blocks[2::2], strict=True))
    return counter.cost.saved / 1e9, max(steps) / 1e9


# ---- the node


CHOSEN = {
    "size": "medium",
    "video": True,
    "formula": "released code",
    "train_on": "x0",
    "steps": 11,
    "learning_rate": 0.012,
    "batch_size": 13,
    "train_unet": JOINT,
    "lora_rank": 14,
    "seed": 15,
    "validate_every": 16,
    "min_snr_gamma": 17.5,
    "checkpointing": True,
    "adapter": "CLIP of source",
    "trained_with": "all attention",
}


def test_every_input_arrives_in_its_field(folder, monkeypatch):
    """All values unlike one another, and unlike the defaults."""
    given, adapter = [], plain()[0]

    def note(model, latent, positive, settings, adapter, watch, **encoders):
        given.extend((settings, adapter, positive, latent, encoders))
        raise InterruptedError

    monkeypatch.setattr(train_node, "train", note)
    latent, positive = tiny_models.latent(), tiny_models.prompt()
    encoders = {"clip_vision": object(), "vae": object()}
    others = {"latent": latent, "positive": positive, "rescue_filename": "x", "context_adapter": adapter, **encoders}
    with pytest.raises(InterruptedError):
        tiny_models.execute(TrainContextAdapter, model=unet(), **others, **CHOSEN)
    assert given[0].named() == CHOSEN
    assert given[1:3] == [adapter, positive]
    assert given[3] is latent["samples"]
    assert given[4] == encoders
    assert all(value != getattr(TrainSettings(), name) for name, value in CHOSEN.items())
    inputs = {entry.id for entry in TrainContextAdapter.define_schema().inputs}
    assert inputs == {*CHOSEN, *others, "model", "preset"}


def test_preset_paper_is_what_the_paper_prints():
    chosen = TrainSettings.of(CHOSEN | {"preset": "paper"})
    printed = {"size": "large", "formula": "paper", "train_on": "x0", "adapter": "CLIP of x0_hat"}
    joint = {"train_unet": "LoRA on to_q", "trained_with": "all attention"}
    assert chosen.named() == CHOSEN | printed | joint


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"positive": prompts(3), "pictures": 2}, "3 prompts for 2 pictures"),
        (lambda: {"positive": [[torch.randn(3, 7, 24), {}]], "pictures": 2}, "3 rows of text for 2 pictures"),
        (lambda: {"positive": []}, "positive holds no prompt"),
        (lambda: {"positive": nodes.ConditioningSetArea().append(tiny_models.prompt(1), 32, 32, 0, 0, 1.0)[0]}, "area"),
        (lambda: {"positive": nodes.ConditioningSetMask().append(
            tiny_models.prompt(1), torch.ones(1, 64, 64), "default", 1.0)[0]}, "mask"),
        (lambda: {"latent": {"samples": torch.full((1, 4, 8, 8), math.nan)}}, "latent holds NaN"),
        (lambda: {"latent": {"samples": torch.zeros(1, 4, 2, 8, 8)}}, "5 dimensions"),
        (lambda: {"context_adapter": other("sdxl")}, "SDXL latents"),
        (lambda: {"context_adapter": other(video=True)}, "is a video adapter and video is off"),
        (lambda: {"context_adapter": other(), "video": True}, "is an image adapter and video is on"),
        (lambda: {"context_adapter": other(width=25)}, "prompts of 25 channels"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        train(**change())


def other(family="sd15", width=24, **config):
    """An untrained adapter."""
    return ContextAdapter.new(AdapterConfig.for_model(unet(family), width, **config))


# ---- flow-matching models


def shy(model):
    """A flow model that predicts too little of the picture at high noise, so that r can help it."""
    return predicting(model, lambda sigma: 1 - 0.7 * sigma)


def sd3_given(pictures=2):
    noise = torch.randn(pictures, 16, 3, 2, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(noise, (12, 8), mode="bilinear")
    return {"latent": {"samples": smooth}, "positive": tiny_transformers.prompt("sd3", 1)}


@pytest.mark.parametrize("kind", ["U-Net", "SD 3"])
def test_a_flow_model_learns_and_the_adapter_acts_in_its_sampling(kind):
    """The transformer stays as it was, and so do its buffers, which the gradient saves."""
    if kind == "U-Net":
        model, given = shy(flow(tiny_models.unet())), {}
    else:
        made = tiny_transformers.model("sd3")
        model, given = shy(made), sd3_given()
    network = model.model.diffusion_model
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    adapter, _, report, _ = train(model, 2, whole=True, steps=12, learning_rate=3e-3, **given)
    assert adapter.info["loss_x0_hat"] < 0.99 and adapter.info["sampled"] < 1.0
    assert "12 steps" in report
    assert_same(dict(network.state_dict()), before)
    ours = tiny_models.execute(ContextSampler, context_adapter=adapter)[0]

    def drawn(sampler):
        guider = comfy.samplers.CFGGuider(model)
        positive = given.get("positive") or tiny_models.prompt(1)
        guider.set_conds(positive, positive)
        guider.set_cfg(1.0)
        levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
        start = torch.randn(given.get("latent", tiny_models.latent(1))["samples"][:1].shape,
                            generator=torch.Generator().manual_seed(3))  # fmt: skip
        return guider.sample(start, torch.zeros_like(start), sampler, levels, disable_pbar=True, seed=5)

    stock = drawn(comfy.samplers.sampler_object("euler"))
    assert (drawn(ours) - stock).norm() > 1e-4 * stock.norm()


@pytest.mark.parametrize("kind", ["U-Net", "SD 3"])
def test_the_gradient_of_a_flow_model_is_the_finite_difference(kind):
    model = flow(tiny_models.unet()) if kind == "U-Net" else tiny_transformers.model("sd3")
    given = {"latent": tiny_models.latent(2), "positive": tiny_models.prompt(1)} if kind == "U-Net" else sd3_given()
    values = differences(model, given["latent"]["samples"], given["positive"])
    assert values["gradient"] == pytest.approx(values["difference"], rel=2e-2)
    assert abs(values["gradient"]) > 1e-4


def test_what_cannot_be_trained_on_is_refused_by_name():
    with pytest.raises(ValueError, match=r"the connected model is Flux, whose rotary positions"):
        train(tiny_transformers.model("flux"), latent={"samples": torch.ones(1, 16, 12, 8)})
    sd3 = {"model": tiny_transformers.model("sd3"), **sd3_given()}
    with pytest.raises(ValueError, match="train_unet adds its LoRA to the layers of a U-Net"):
        train(**sd3, train_unet=JOINT)
    with pytest.raises(ValueError, match="prompts of other lengths cannot share a step of SD 3"):
        train(**sd3 | {"positive": tiny_transformers.prompt("sd3", 1) + tiny_transformers.prompt("sd3", 2, 12)})
