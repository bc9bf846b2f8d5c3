"""Train Instruction in the host: what is trained and written, its habits, and what it refuses."""

from dataclasses import fields

import comfy.model_management
import comfy.sd
import comfy.utils
import harness
import pytest
import tiny_models
import torch
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from instruction_training import teaching
from instruction_training.teaching import teach
from lora_training.teaching import SmallVAE, text_encoder
from palimpsest.nodes import host
from palimpsest.nodes.feature_blend import feature_layers
from palimpsest.nodes.feature_blend import files as blend_files
from palimpsest.nodes.host import widening
from palimpsest.nodes.instruction_training import blending, fit, learning
from palimpsest.nodes.instruction_training.files import STATES
from palimpsest.nodes.instruction_training.settings import INSTRUCT, WHOLE, InstructionSettings
from palimpsest.nodes.training import generator_at
from safetensors.torch import save_file

families = pytest.mark.parametrize("family", ["sd15", "sdxl", "sd15_edit", "sdxl_edit"])


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    teaching.use_folders(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return tiny_models.unet()


@pytest.fixture(scope="module")
def edit_model():
    return tiny_models.unet("sd15_edit")


@pytest.fixture(scope="module")
def clip():
    return text_encoder()


def written(folders, file, kind="loras"):
    return comfy.utils.load_torch_file(str(folders / kind / file), safe_load=True)


def sampled(model, clip, text="make it blue", seed=1):
    """An edit by the host's own nodes, from noise."""
    with torch.inference_mode():
        both = [clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in (text, "")]
        seen = {"pixels": tiny_models.picture(seed=seed), "vae": SmallVAE()}
        positive, negative, _ = tiny_models.execute(
            InstructPixToPixConditioning, positive=both[0], negative=both[1], **seen
        )
        return harness.sample_noise(model, None, positive, negative, steps=2)


# ---- what is trained and written


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_widened_model_draws_what_it_drew_whatever_the_picture(family):
    model, clip = tiny_models.unet(family), text_encoder(family)
    wide = widening.with_channels(model, "Test")
    assert host.picture_channels(wide).number == 4
    assert widening.is_blank(wide)
    assert type(wide.model).__name__.endswith("instructpix2pix")
    assert torch.equal(sampled(wide, clip), sampled(model, clip))
    assert torch.equal(sampled(wide, clip, seed=2), sampled(model, clip))


def test_patches_on_a_model_come_along_when_it_is_widened(clip):
    model = tiny_models.unet()
    content = tiny_models.lora(model)
    weight = model.model.diffusion_model.input_blocks[0][0].weight
    content |= {"lora_unet_conv_in.lora_up.weight": torch.randn(len(weight), 2, 1, 1),
                "lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3)}  # fmt: skip
    patched, _ = comfy.sd.load_lora_for_models(model, None, content, 0.7, 0.0)
    harness.assert_acts(sampled(patched, clip), sampled(model, clip))
    torch.testing.assert_close(sampled(widening.with_channels(patched, "Test"), clip), sampled(patched, clip))


@families
def test_the_stock_loader_takes_the_lora_whole_and_draws_what_the_node_gives(family, folders, caplog):
    model, clip = tiny_models.unet(family), text_encoder(family[:4])
    before = sampled(model, clip)
    changed, *_, file = teach(model, clip)
    content = written(folders, file)
    wide = model if family.endswith("edit") else widening.with_channels(model, "Test")
    again, _ = comfy.sd.load_lora_for_models(wide, None, content, 1.0, 0.0)
    assert "not loaded" not in caplog.text
    assert "MISMATCH" not in caplog.text
    whole = learning.FIRST_IN_FILES in content
    assert whole is not family.endswith("edit")
    assert len(again.patches) == len([key for key in content if key.endswith(".alpha")]) + whole
    assert torch.equal(sampled(again, clip), sampled(changed, clip))
    harness.assert_acts(sampled(changed, clip), sampled(wide, clip))
    harness.assert_acts(sampled(changed, clip, seed=2), sampled(changed, clip))  # the picture is read
    assert torch.equal(sampled(model, clip), before)


@pytest.mark.parametrize("family", ["sd15", "sd15_edit"])
def test_a_whole_unet_is_trained_and_written(family, folders):
    model, clip = tiny_models.unet(family), text_encoder()
    before = sampled(model, clip)
    changed, *_, report, file = teach(model, clip, method=WHOLE, learning_rate=1e-3)
    content = written(folders, file, "diffusion_models")
    network = changed.model.diffusion_model
    assert content.keys() == {f"model.diffusion_model.{name}" for name, _ in network.named_parameters()}
    assert content["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 8
    assert WHOLE in report
    loaded = tiny_models.unet("sd15_edit", seed=5)
    with torch.inference_mode():
        plain = {name.removeprefix("model.diffusion_model."): tensor.float() for name, tensor in content.items()}
        loaded.model.diffusion_model.load_state_dict(plain)
    torch.testing.assert_close(sampled(loaded, clip), sampled(changed, clip), rtol=0.02, atol=0.02)
    harness.assert_acts(sampled(changed, clip, seed=2), sampled(changed, clip))
    assert torch.equal(sampled(model, clip), before)


def test_every_weight_of_the_host_learns_when_the_whole_unet_does(edit_model):
    network = edit_model.model.diffusion_model
    assert learning.shapes_of(network).keys() == {name for name, _ in network.named_parameters()}


def test_the_unet_that_a_lora_belongs_to_is_kept_or_not(model, clip, folders):
    *_, report, file = teach(model, clip, filename="edits")
    base = written(folders, "edits_00001_base.safetensors", "diffusion_models")
    assert not base["model.diffusion_model.input_blocks.0.0.weight"][:, 4:].any()
    assert "belongs to edits_00001_base.safetensors" in report
    teach(model, clip, filename="edits", keep_widened=False)
    assert [path.name for path in (folders / "diffusion_models").iterdir()] == ["edits_00001_base.safetensors"]
    assert file == "edits_00001.safetensors"


def test_load_diffusion_model_takes_a_widened_unet_for_instruct_pix2pix(pocket_checkpoint, folders):
    with torch.inference_mode():
        model, *_ = comfy.sd.load_checkpoint_guess_config(str(pocket_checkpoint), output_vae=False, output_clip=False)
        wide = widening.with_channels(model, "Test")
        save_file(learning.unet_file(wide), folders / "diffusion_models" / "wide.safetensors")
        loaded = comfy.sd.load_diffusion_model(str(folders / "diffusion_models" / "wide.safetensors"))
    assert type(loaded.model).__name__ == "SD15_instructpix2pix"
    weights = loaded.model.diffusion_model.state_dict()
    for name, weight in wide.model.diffusion_model.state_dict().items():
        assert torch.equal(weights[name], weight), name


def test_what_is_previewed_while_training_is_what_the_hosts_dual_guider_draws(edit_model, clip, folders):
    """The last preview, and the same noise and steps through the host's nodes with the file on the plain model."""
    from comfy.k_diffusion.sampling import get_sigmas_karras
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    kept, real = [], fit.FitInstruction.draw

    def draw(self):
        kept.append(real(self))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit.FitInstruction, "draw", draw)
        changed, _, sheet, *_ = teach(edit_model, clip, preview_every=2, text_guidance=3.0)
    assert len(kept) == 2
    assert sheet.shape[3] == 3

    def drawn(model):
        with torch.inference_mode():
            positive, none = (clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("make it blue", ""))
            seen = {"pixels": teaching.pictures()[0], "vae": SmallVAE()}
            first, second, _ = tiny_models.execute(
                InstructPixToPixConditioning, positive=positive, negative=none, **seen
            )
            (guider,) = tiny_models.execute(
                DualCFGGuider, model=model, cond1=first, cond2=second, negative=none, cfg_conds=3.0,
                cfg_cond2_negative=1.5, style="regular",
            )  # fmt: skip
            sampling = model.get_model_object("model_sampling")
            levels = get_sigmas_karras(fit.PREVIEW_STEPS, float(sampling.sigma_min), float(sampling.sigma_max))
            noise = torch.randn(1, 4, 8, 8, generator=generator_at(0, "preview", 0))
            solver = comfy.samplers.sampler_object("dpmpp_2m")
            found = guider.sample(noise, torch.zeros_like(noise), solver, levels, disable_pbar=True, seed=0)
        return model.model.process_latent_in(found)

    wanted, error = drawn(changed), kept[-1][0]
    assert (error - wanted).norm() < 0.1 * (error - drawn(edit_model)).norm()


# ---- its habits


def same(folders, first, second, kind="loras"):
    a, b = written(folders, first, kind), written(folders, second, kind)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_same_seed_is_the_same_file_whatever_was_drawn_before(model, clip, folders):
    first = teach(model, clip)[-1]
    torch.manual_seed(77)
    assert same(folders, first, teach(model, clip)[-1])
    assert not same(folders, first, teach(model, clip, seed=1)[-1])


def test_checkpointing_changes_nothing(model, clip, folders):
    assert same(folders, *(teach(model, clip, checkpointing=how)[-1] for how in (True, False)))


@pytest.mark.parametrize("more", [{}, {"method": WHOLE, "batch_size": 2, "drop_text": 0.3, "words_inside": True}])
def test_a_resumed_training_ends_as_one_that_was_never_stopped(model, clip, folders, more):
    more = {"masks": [harness.half()], **more} if more else more
    settings = {"steps": 6, "save_every": 2, "keep_state": "with every file", "keep_widened": False, **more}
    whole = teach(model, clip, **settings)[-1]
    states = sorted(path.name for path in (folders / STATES.folder).glob("*_s*"))
    assert len(states) == 2
    for state in states:
        *_, report, file = teach(model, clip, resume=state, **settings)
        assert same(folders, whole, file, "diffusion_models" if more else "loras")
        assert "steps after" in report


def test_other_settings_do_not_go_on(model, clip, folders):
    teach(model, clip)
    (state,) = (path.name for path in (folders / STATES.folder).glob("*.safetensors"))
    with pytest.raises(ValueError, match="rank 4 then, 8 now"):
        teach(model, clip, rank=8, resume=state)


def test_a_state_of_another_model_is_a_sentence(model, edit_model, clip, folders):
    teach(model, clip, keep_widened=False)
    (state,) = (path.name for path in (folders / STATES.folder).glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"made with another model \(its unet.input_blocks.0.0.up is missing"):
        teach(edit_model, clip, resume=state)


def test_a_cancelled_training_goes_on_as_if_it_had_not_been(model, clip, folders, monkeypatch):
    whole = teach(model, clip, filename="whole", keep_state="none")[-1]
    real = fit.FitInstruction.after

    def cancel(self, step):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException
        real(self, step)

    monkeypatch.setattr(fit.FitInstruction, "after", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        teach(model, clip, filename="half")
    monkeypatch.setattr(fit.FitInstruction, "after", real)
    assert (folders / "loras" / "half_00001.safetensors").is_file()
    *_, report, file = teach(model, clip, resume="half_00001.safetensors", filename="half")
    assert "2 steps after 2" in report
    assert same(folders, whole, file)


def test_patches_of_other_nodes_act_while_it_learns(edit_model, clip, folders):
    plain = teach(edit_model, clip)[-1]
    patched = edit_model.clone()
    patched.set_model_attn2_output_patch(lambda out, options: out * 0.5)
    assert not same(folders, plain, teach(patched, clip)[-1])


def test_the_guidance_of_other_nodes_does_not_act_while_it_learns(edit_model, clip, folders):
    *_, report, file = teach(harness.guided(edit_model), clip)
    assert same(folders, teach(edit_model, clip)[-1], file)
    assert "left out (PerturbedAttentionGuidance)" in report


@pytest.mark.parametrize(
    "changes", [{"reconstruction": 1.0}, {"min_snr_gamma": 5.0}, {"drop_picture": 0.9}, {"convolutions": False}]
)
def test_settings_act(edit_model, clip, folders, changes):
    assert not same(folders, teach(edit_model, clip)[-1], teach(edit_model, clip, **changes)[-1])


def test_masks_act_where_words_are_kept_inside_and_white_ones_do_not(edit_model, clip, folders):
    plain = teach(edit_model, clip, masks=[harness.half()])[-1]
    white = teach(edit_model, clip, masks=[torch.ones(1, 64, 64)], words_inside=True)[-1]
    half = teach(edit_model, clip, masks=[harness.half()], words_inside=True)[-1]
    assert same(folders, plain, white)
    assert not same(folders, plain, half)


def test_blend_weights_learn_beside_and_are_kept_for_feature_blend(edit_model, clip, folders):
    plain = teach(edit_model, clip)[-1]
    *_, report, file = teach(edit_model, clip, blend_layers="output, out", preview_every=4)
    assert not same(folders, plain, file)
    weights = blend_files.load(str(folders / "palimpsest_blend" / file))
    weights.require_sound()
    assert len(weights.on(feature_layers(edit_model, "Test"))) == len(weights.alphas) == 5
    assert all(alpha != 0.5 for alpha in weights.alphas.values())
    assert f"weights for Feature Blend: {weights}" in report


def test_a_blend_of_all_edit_is_the_plain_prediction(edit_model, clip, folders, monkeypatch):
    """alpha = 1 in every feature: the source's pass changes nothing."""
    monkeypatch.setattr(blending.Alphas, "__getitem__", lambda self, key: (1.0, 1.0))
    plain = teach(edit_model, clip)[-1]
    assert same(folders, plain, teach(edit_model, clip, blend_layers="output, out")[-1])


@pytest.mark.parametrize("family", ["sd15", "sdxl_edit"])
def test_v_prediction_and_a_model_that_learns(family, folders):
    model, clip = tiny_models.unet(family, "V_PREDICTION"), text_encoder(family[:4])
    report = teach(model, clip, steps=12, held_out=1)[-2]
    assert report.startswith("3 triples, 12 steps")
    assert "nan" not in report


# ---- settings and what it refuses


def test_memory_and_files_are_what_the_tooltips_say():
    """20 bytes a weight: change, gradient, two of AdamW, and the last good values; files of 2, states of 12."""
    network = tiny_models.unet_without_weights("sd15-full").model.diffusion_model
    weights = sum(torch.Size(shape).numel() for shape in learning.shapes_of(network).values())
    assert [round(size * weights / 1e9, digits) for size, digits in ((20, 0), (12, 0), (2, 1))] == [17, 10, 1.7]
    assert round((8 - 2) * weights / 1e9) == 5  # two states of 32 bits against two of 8


def test_every_setting_reaches_its_field():
    ids = {i.id for i in teaching.TrainInstruction.define_schema().inputs}
    assert {field.name for field in fields(InstructionSettings)} <= ids
    chosen = InstructionSettings.of({"preset": INSTRUCT, "steps": 3, "rank": 9})
    assert (chosen.steps, chosen.method, chosen.batch_size * chosen.accumulation) == (10000, WHOLE, 1024)
    assert chosen.rank == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": [tiny_models.picture()]}, "4 pictures and 1 results"),
        ({"pictures": None, "results": None}, "0 pictures and 0 results"),
        ({"instructions": ["a", "b"]}, "2 instructions for 4 pictures"),
        ({"instructions": [""]}, "0 instructions for 4 pictures"),
        ({"masks": [torch.zeros(1, 64, 64)]}, "mask of triple 1 is black all over"),
        ({"masks": [torch.ones(2, 64, 64)]}, "2 masks for 4 pictures"),
        ({"words_inside": True}, "no triple has one"),
        ({"held_out": 4}, "held_out is 4 of 4 triples"),
        ({"drop_text": 0.6, "drop_both": 0.6}, "more than all steps together"),
        ({"folder": "nowhere"}, "pictures are connected and the folder nowhere is chosen"),
        ({"folder": "nowhere", "pictures": None, "results": None}, "no folder of triples 'nowhere'"),
        ({"filename": "../.."}, "no letters or digits"),
        ({"results": teaching.pictures(20)[::-1]}, "they must show the same part of the scene"),
    ],
)
def test_bad_input_is_a_sentence(model, clip, changes, message):
    with pytest.raises(ValueError, match=message):
        teach(model, clip, **changes)


@pytest.mark.parametrize("family", ["sd15-inpaint"])
def test_models_without_such_a_form_are_refused(family, clip):
    with pytest.raises(ValueError, match=r"trains SD 1\.5 and SDXL models"):
        teach(tiny_models.unet(family), clip)


def test_nan_in_the_first_step_is_the_models(clip):
    broken = tiny_models.unet()
    with torch.inference_mode():
        broken.model.diffusion_model.out[2].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="returns NaN for these triples"):
        teach(broken, clip)
