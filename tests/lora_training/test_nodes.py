"""Train LoRA in the host: what is trained and written, its habits, and what it refuses."""

import itertools
from dataclasses import fields, replace
from types import SimpleNamespace

import comfy.lora
import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.utils
import harness
import pytest
import tiny_models
import torch
from comfy.k_diffusion.sampling import get_sigmas_karras
from lora_training import teaching
from lora_training.teaching import teach, text_encoder
from palimpsest.kernels.lora import CONSTANT, DEBIASED, LOSS_WEIGHTS, PICTURE
from palimpsest.nodes.lora import fit, layers, pictures, priors
from palimpsest.nodes.lora.files import STATES
from palimpsest.nodes.lora.settings import PAPER, STYLE, LoRASettings
from palimpsest.nodes.training import generator_at, optimisers
from palimpsest.nodes.training.pictures import Order, bucket_of
from palimpsest.nodes.training.prompts import Prompts
from safetensors import safe_open

families = pytest.mark.parametrize("family", ["sd15", "sdxl"])


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    teaching.use_folders(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return tiny_models.unet()


@pytest.fixture(scope="module")
def clip():
    return text_encoder()


def written(folders, file, kind="loras"):
    return comfy.utils.load_torch_file(str(folders / kind / file), safe_load=True)


def sampled(model, clip, text="a cat"):
    with torch.inference_mode():
        both = [clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in (text, "")]
        return harness.sample_noise(model, None, *both, steps=2)


# ---- what is trained and written


@pytest.mark.parametrize(("family", "unet", "text"), [("sd15-full", 192, 72), ("sdxl-full", 722, 264)])
def test_the_layers_are_kohyas(family, unet, text):
    model = tiny_models.unet_without_weights(family)
    names = layers.unet_layers(model, convolutions=False)
    assert len(names) == len(set(names.values())) == unet
    assert set(names.values()) <= comfy.lora.model_lora_keys_unet(model.model, {}).keys()
    more = layers.unet_layers(model, convolutions=True)
    assert names.items() < more.items()
    order = [name for name, _ in model.model.diffusion_model.named_modules() if name in more]
    assert list(more) == order  # the host's order is another in each process
    assert all(model.model.diffusion_model.get_submodule(name).weight.ndim in (2, 4) for name in more)
    kind = comfy.sd1_clip.SD1ClipModel if family == "sd15-full" else comfy.sdxl_clip.SDXLClipModel
    encoder = SimpleNamespace(cond_stage_model=kind(device="meta", dtype=torch.float16))
    assert len(layers.text_layers(encoder)) == text


@pytest.mark.parametrize(("family", "megabytes"), [("sd15-full", (14, 32)), ("sdxl-full", (85, 97))])
def test_convolutions_cost_what_the_tooltip_says(family, megabytes):
    model = tiny_models.unet_without_weights(family)
    network = model.model.diffusion_model
    for convolutions, wanted in zip((False, True), megabytes, strict=True):
        shapes = [
            network.get_submodule(name).weight.shape for name in layers.unet_layers(model, convolutions=convolutions)
        ]
        numbers = sum(LoRASettings().rank * (shape[0] + shape[1:].numel()) for shape in shapes)
        assert round(2 * numbers / 1e6) == wanted


@pytest.mark.parametrize(("family", "count"), [("sd15-full", (314, 380)), ("sdxl-full", (814, 865))])
def test_norms_learn_whole_and_biases_where_their_layer_does(family, count):
    model = tiny_models.unet_without_weights(family)
    for convolutions, wanted in zip((False, True), count, strict=True):
        trained = layers.unet_layers(model, convolutions)
        names = layers.unet_vectors(model, trained)
        assert len(set(names.values())) == len(names) == wanted
        biases = {name.removesuffix(".diff_b") for name in names.values() if name.endswith(".diff_b")}
        assert biases <= set(trained.values())  # nothing but a bias is a layer that other programs refuse
        others = {name.rpartition(".")[0] for name in names.values()} - biases
        assert others <= comfy.lora.model_lora_keys_unet(model.model, {}).keys()
        numbers = sum(model.model.diffusion_model.get_parameter(name).numel() for name in names)
        assert round(2 * numbers / 1e6) == {"sd15-full": 1, "sdxl-full": 3}[family]  # MB, as the tooltip says


@families
def test_the_stock_loader_takes_the_file_whole_and_draws_what_the_node_gives(family, folders, caplog):
    model, clip = tiny_models.unet(family), text_encoder(family)
    changed, read, *_, file = teach(model, clip)
    content = written(folders, file)
    again, text = comfy.sd.load_lora_for_models(model, clip, content, 1.0, 1.0)
    assert "not loaded" not in caplog.text
    assert len(again.patches) + len(text.patcher.patches) == len([key for key in content if key.endswith(".alpha")])
    assert torch.equal(sampled(again, text), sampled(changed, read))
    harness.assert_acts(sampled(changed, read), sampled(model, clip))
    harness.assert_acts(sampled(changed, clip), sampled(model, clip))
    harness.assert_acts(sampled(model, read), sampled(model, clip))


def test_strength_0_and_the_plain_model_afterwards_are_bit_equal(model, clip, folders):
    before = sampled(model, clip)
    file = teach(model, clip)[-1]
    assert torch.equal(sampled(model, clip), before)
    nothing = comfy.sd.load_lora_for_models(model, clip, written(folders, file), 0.0, 0.0)
    assert torch.equal(sampled(*nothing), before)
    assert not any(m._forward_pre_hooks for m in clip.cond_stage_model.modules())


def test_what_is_drawn_while_training_is_what_the_file_draws(model, clip, folders):
    """The last preview, and the same prompt, noise and steps with the file on the plain model."""
    kept, real = [], fit.FitLoRA.draw

    def draw(self):
        kept.append(real(self))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit.FitLoRA, "draw", draw)
        changed, read, _, sheet, *_ = teach(model, clip, preview_every=1, guidance=3.0, preview_prompts="a cat\na fish")
    assert len(kept) == 2 and len(kept[0]) == 2
    assert sheet.shape[3] == 3

    def drawn(model, clip):
        with torch.inference_mode():
            both = [clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("a fish", "")]
        sampling = model.get_model_object("model_sampling")
        levels = get_sigmas_karras(fit.PREVIEW_STEPS, float(sampling.sigma_min), float(sampling.sigma_max))
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*both)
        guider.set_cfg(3.0)
        start = torch.randn(1, 4, 8, 8, generator=generator_at(0, "preview", 1))
        solver = comfy.samplers.sampler_object("dpmpp_2m")
        found = guider.sample(start, torch.zeros_like(start), solver, levels, disable_pbar=True, seed=0)
        return model.model.process_latent_in(found)

    wanted, error = drawn(changed, read), kept[-1][1]
    assert (error - wanted).norm() < 0.1 * (error - drawn(model, clip)).norm()


def test_a_preview_encodes_its_texts_once(model, clip, folders, monkeypatch):
    encoded, drawing, real = [], [], fit.FitLoRA.draw

    def draw(self):
        before = len(encoded)
        found = real(self)
        drawing.append(len(encoded) - before)
        return found

    encode = Prompts.encode
    monkeypatch.setattr(fit.FitLoRA, "draw", draw)
    monkeypatch.setattr(Prompts, "encode", lambda self, text: encoded.append(text) or encode(self, text))
    teach(model, clip, epochs=1, repeats=1, preview_every=1, preview_prompts="a cat\na fish")
    assert drawing == [4]  # two prompts, each beside the empty one


def test_metadata_names_what_other_programs_show(model, clip, folders):
    file = teach(model, clip, rank=2, alpha=1.0)[-1]
    with safe_open(folders / "loras" / file, "pt") as opened:
        told = opened.metadata()
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("2", "1.0")
    assert told["ss_network_module"] == "networks.lora"
    assert all(tensor == 1.0 for key, tensor in written(folders, file).items() if key.endswith(".alpha"))


def test_alpha_is_frozen_and_norms_and_biases_are_left_alone(model, clip, folders):
    content = written(folders, teach(model, clip)[-1])
    assert {key.rsplit(".", 1)[1] for key in content} == {"weight", "alpha"}
    assert not any("norm" in key or "bias" in key for key in content)


def test_convolutions_are_trained_where_wanted(model, clip, folders):
    content = written(folders, teach(model, clip, convolutions=True, text_rate=0.0)[-1])
    down = content["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"]
    assert down.shape[2:] == (3, 3)
    applied, _ = comfy.sd.load_lora_for_models(model, clip, content, 1.0, 1.0)
    assert len(applied.patches) == len([key for key in content if key.endswith(".alpha")])


@families
def test_norms_and_biases_are_trained_where_wanted_and_the_stock_loader_takes_them(family, folders, caplog):
    model, clip = tiny_models.unet(family), text_encoder(family)
    before = sampled(model, clip)
    changed, read, *_, file = teach(model, clip, biases=True)
    content = written(folders, file)
    vectors = {key: change for key, change in content.items() if key.endswith(("w_norm", "b_norm", "diff_b"))}
    assert len(vectors) == len(layers.unet_vectors(model, layers.unet_layers(model, convolutions=False))) > 50
    assert all(change.any() for key, change in vectors.items() if "attn2_to_out" in key or key.endswith("w_norm"))
    again, text = comfy.sd.load_lora_for_models(model, clip, content, 1.0, 1.0)
    assert "not loaded" not in caplog.text
    assert torch.equal(sampled(again, text), sampled(changed, read))
    without = {key: change for key, change in content.items() if key not in vectors}
    harness.assert_acts(
        sampled(comfy.sd.load_lora_for_models(model, clip, without, 1.0, 1.0)[0], text), sampled(again, text)
    )
    assert torch.equal(sampled(model, clip), before)


# ---- its habits


def same(folders, first, second):
    a, b = written(folders, first), written(folders, second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_same_seed_is_the_same_file_whatever_was_drawn_before(model, clip, folders):
    first = teach(model, clip)[-1]
    torch.manual_seed(77)
    assert same(folders, first, teach(model, clip)[-1])
    assert not same(folders, first, teach(model, clip, seed=1)[-1])


@pytest.mark.parametrize("biases", [True, False])
def test_checkpointing_changes_nothing(model, clip, folders, biases):
    files = [teach(model, clip, epochs=1, biases=biases, checkpointing=how)[-1] for how in (True, False)]
    assert same(folders, *files)


@pytest.mark.parametrize(
    "more", [{}, {"accumulation": 2, "batch_size": 2, "flip": True, "caption_dropout": 0.3}, {"biases": True}]
)
def test_a_resumed_training_ends_as_one_that_was_never_stopped(model, clip, folders, more):
    settings = {"epochs": 3, "save_every": 1, "keep_state": "with every file", **more}
    whole = teach(model, clip, **settings)[-1]
    states = sorted(path.name for path in (folders / STATES.folder).glob("*_ep*"))
    assert len(states) == 2
    for state in states:
        *_, report, file = teach(model, clip, resume=state, **settings)
        assert same(folders, whole, file)
        assert "steps after" in report


def test_other_settings_do_not_go_on(model, clip, folders):
    teach(model, clip)
    (state,) = (path.name for path in (folders / STATES.folder).glob("*.safetensors"))
    with pytest.raises(ValueError, match="rank 4 then, 8 now"):
        teach(model, clip, rank=8, resume=state)


def test_files_on_the_way_share_one_free_name(model, clip, folders):
    for number in (1, 2):
        report = teach(model, clip, epochs=3, save_every=1, filename="style")[-2]
        names = [f"style_{number:05}{end}.safetensors" for end in ("_ep01", "_ep02", "")]
        assert report.endswith(", ".join(names))
        assert all((folders / "loras" / name).is_file() for name in names)


def test_a_cancelled_training_keeps_what_it_learned(model, clip, folders, monkeypatch):
    def cancel(self, step):
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(fit.FitLoRA, "after", cancel)
    before = sampled(model, clip)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        teach(model, clip, filename="half")
    assert len(written(folders, "half_00001.safetensors")) == 3 * (84 + 18)
    assert not any(m._forward_pre_hooks for m in clip.cond_stage_model.modules())
    assert torch.equal(sampled(model, clip), before)


def test_a_cancelled_training_goes_on_as_if_it_had_not_been(model, clip, folders, monkeypatch):
    whole = teach(model, clip)[-1]
    (finished,) = (folders / STATES.folder).glob("*.safetensors")
    finished.unlink()
    real = fit.FitLoRA.after

    def cancel(self, step):
        if step == 4:
            raise comfy.model_management.InterruptProcessingException
        real(self, step)

    monkeypatch.setattr(fit.FitLoRA, "after", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        teach(model, clip)
    monkeypatch.setattr(fit.FitLoRA, "after", real)
    (state,) = (path.name for path in (folders / STATES.folder).glob("*.safetensors"))
    *_, report, file = teach(model, clip, resume=state)
    assert "steps after 5" in report
    assert same(folders, whole, file)


def test_the_hosts_button_ends_it_before_the_next_batch(model, clip, folders, monkeypatch):
    seen, real = [], fit.FitLoRA.losses

    def losses(self, step, *batch):
        seen.append(step)
        if step == 2:
            comfy.model_management.interrupt_current_processing()
        return real(self, step, *batch)

    monkeypatch.setattr(fit.FitLoRA, "losses", losses)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        teach(model, clip, filename="button")
    assert seen == [0, 1, 2]
    assert (folders / "loras" / "button_00001.safetensors").is_file()


def test_nan_on_the_way_ends_it_with_the_weights_before(model, clip, folders, monkeypatch):
    real = fit.FitLoRA.losses

    def losses(self, step, *batch):
        found, places = real(self, step, *batch)
        return (found * float("nan") if step == 3 else found), places

    monkeypatch.setattr(fit.FitLoRA, "losses", losses)
    *_, report, file = teach(model, clip)
    assert "earlier weights are kept" in report
    assert all(tensor.isfinite().all() for tensor in written(folders, file).values())


def test_loras_already_on_the_model_act_while_it_learns(clip, folders):
    model = tiny_models.unet()
    other, _ = comfy.sd.load_lora_for_models(model, None, tiny_models.lora(model), 1.0, 0.0)
    assert not same(folders, teach(model, clip)[-1], teach(other, clip)[-1])


def test_the_guidance_of_other_nodes_does_not_act_while_it_learns(model, clip, folders):
    previews = {"preview_every": 1, "epochs": 1}
    *_, report, file = teach(harness.guided(model), clip, **previews)
    assert same(folders, teach(model, clip, **previews)[-1], file)
    assert "left out (PerturbedAttentionGuidance)" in report


def test_eight_bits_are_named_or_their_absence_is(model, clip):
    report = teach(model, clip, optimiser="AdamW 8-bit", epochs=1)[-2]
    assert "bitsandbytes" in report or "torchao" in report


def test_masks_and_class_pictures_act(model, clip, folders):
    plain = teach(model, clip)[-1]
    assert not same(folders, plain, teach(model, clip, masks=[harness.half()])[-1])
    priors = {"class_images": [tiny_models.picture(seed=40)], "class_caption": "an animal"}
    assert not same(folders, plain, teach(model, clip, **priors)[-1])


@families
def test_the_model_draws_pictures_of_the_class_itself(family, folders):
    model, clip = tiny_models.unet(family), text_encoder(family)
    before = sampled(model, clip)
    settings = LoRASettings(class_count=2, resolution=64, seed=5)
    with torch.inference_mode():
        found, again = (list(priors.drawn(model, clip, " an (animal) ", settings)) for _ in range(2))
    assert [(e.caption, e.prior, e.latent.shape) for e in found] == [("an (animal)", True, (1, 4, 8, 8))] * 2
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0].latent, found[1].latent)
    plain, drawn = (teach(model, clip, class_caption="an animal", class_count=n)[-1] for n in (0, 2))
    assert not same(folders, plain, drawn)
    assert torch.equal(sampled(model, clip), before)


def test_class_pictures_are_what_the_hosts_sampler_draws(model, clip):
    """The same noise through the host's own node: KSampler with dpmpp_2m, karras."""
    settings = LoRASettings(class_count=1, resolution=64, guidance=3.0)
    with torch.inference_mode():
        (found,) = priors.drawn(model, clip, "a fish", settings)
        both = [clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("a fish", "")]
        noise = torch.randn(1, 4, 8, 8, generator=generator_at(0, "class", 0))
        chosen = {"steps": 20, "cfg": 3.0, "sampler": "dpmpp_2m", "scheduler": "karras"}
        wanted = harness.sample_noise(model, noise, *both, **chosen)
    assert torch.allclose(model.model.process_latent_out(found.latent), wanted, rtol=1e-4, atol=1e-4)


def test_v_prediction_and_a_model_that_learns(clip):
    model = tiny_models.unet("sd15", "V_PREDICTION")
    weights = {"min_snr_gamma": 5.0, "loss_weight": DEBIASED}
    report = teach(model, clip, epochs=6, repeats=4, noise_offset=0.05, **weights)[-2]
    assert "nan" not in report


def test_each_weight_of_the_levels_learns_something_else(model, clip, folders):
    files = [teach(model, clip, epochs=1, text_rate=0.0, loss_weight=kind)[-1] for kind in LOSS_WEIGHTS]
    assert not any(same(folders, first, second) for first, second in itertools.combinations(files, 2))
    assert same(folders, files[0], teach(model, clip, epochs=1, text_rate=0.0)[-1])


# ---- settings


def test_every_setting_reaches_its_field():
    schema_ids = {i.id for i in teaching.TrainLoRA.define_schema().inputs}
    assert {field.name for field in fields(LoRASettings)} <= schema_ids
    chosen = LoRASettings.of({"preset": PAPER, "epochs": 3, "rank": 9})
    assert (chosen.epochs, chosen.repeats, chosen.learning_rate, chosen.text_rate) == (20, 5, 1e-4, 1e-5)
    assert chosen.rank == 9


def test_the_preset_for_a_style_leaves_the_numbers_as_they_are_set():
    chosen = LoRASettings.of({"preset": STYLE, "epochs": 3, "rank": 9, "learning_rate": 5e-4})
    own = LoRASettings(epochs=3, rank=9, learning_rate=5e-4)
    wanted = {"convolutions": True, "biases": True, "loss_weight": PICTURE, "noise_offset": 0.1, "schedule": CONSTANT}
    assert chosen == replace(own, **wanted)


def test_the_papers_steps():
    """35 pictures, 5 repeats, 20 epochs, batch 1: 3,500 steps."""
    settings = LoRASettings.of({"preset": PAPER})
    order = Order([pictures.Example(torch.zeros(1, 4, 8, 8), "")] * 35, settings)
    assert order.steps_per_epoch * settings.epochs == 3500
    assert sorted(row for step in order.epoch(0) for rows in step for row in rows) == sorted([*range(35)] * 5)


@pytest.mark.parametrize(
    ("size", "resolution", "wanted"),
    [
        ((512, 512), 512, (512, 512)),
        ((640, 480), 512, (576, 448)),
        ((100, 900), 512, (192, 1344)),
        ((1, 1), 64, (64, 64)),
    ],
)
def test_buckets_keep_proportions_and_area(size, resolution, wanted):
    found = bucket_of(*size, resolution)
    assert all(side % 64 == 0 for side in found)
    assert found == wanted
    assert found[0] * found[1] <= max(resolution, 64) ** 2


def test_captions_for_pictures():
    assert pictures.captions_for(2, ["one\ntwo"], "zwx") == ["zwx, one", "zwx, two"]
    assert pictures.captions_for(3, ["all"], "") == ["all"] * 3
    assert pictures.captions_for(2, ["", "b"], "zwx") == ["zwx", "zwx, b"]
    assert pictures.captions_for(1, ["one\ntwo"], "") == ["one two"]
    for captions in (["a", "b"], ["a\nb"]):
        with pytest.raises(ValueError, match="2 captions for 3 pictures"):
            pictures.captions_for(3, captions, "")


def test_a_state_comes_back_as_it_was():
    weight = torch.randn(3, 4, requires_grad=True)
    made = optimisers.optimiser_for([{"params": [weight], "lr": 0.1, "start": 0.1}], LoRASettings())
    weight.sum().backward()
    made.steps.step()
    other = optimisers.optimiser_for([{"params": [weight], "lr": 0.1, "start": 0.1}], LoRASettings())
    optimisers.restore(other.steps, optimisers.state_of(made.steps))
    assert all(torch.equal(v, other.steps.state[weight][k]) for k, v in made.steps.state[weight].items())


# ---- what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": ["a", "b"]}, "2 captions for 4 pictures"),
        ({"masks": [torch.zeros(1, 64, 64)]}, "mask 1 is empty"),
        ({"masks": [torch.ones(2, 64, 64)]}, "2 masks for 4 pictures"),
        ({"class_images": [tiny_models.picture()]}, "class_caption"),
        ({"class_count": 2}, "class_count is 2 and class_caption empty"),
        ({"filename": "../.."}, "no letters or digits"),
    ],
)
def test_bad_input_is_a_sentence(model, clip, changes, message):
    with pytest.raises(ValueError, match=message):
        teach(model, clip, **changes)


def test_a_clip_of_another_width_is_told(model, monkeypatch):
    monkeypatch.setitem(teaching.WIDTHS, "sd15", 16)
    with pytest.raises(ValueError, match=r"16.*24|24.*16"):
        teach(model, text_encoder())


def test_a_gpu_without_room_is_told_what_takes_less(model, clip, monkeypatch):
    def losses(self, *_):
        raise comfy.model_management.OOM_EXCEPTION("no room")

    monkeypatch.setattr(fit.FitLoRA, "losses", losses)
    with pytest.raises(RuntimeError, match="Train LoRA needs more graphics memory than there is: switch checkpointing"):
        teach(model, clip)


def test_nan_in_the_first_step_is_the_models(clip):
    broken = tiny_models.unet()
    with torch.inference_mode():
        broken.model.diffusion_model.out[2].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="returns NaN for these pictures"):
        teach(broken, clip)
