"""Train Text Control in the host: what learns, what stays, its habits, and what it refuses."""

import json
import re
from dataclasses import fields

import comfy.model_management
import comfy.sd
import folder_paths
import harness
import pytest
import tiny_models
import torch
from fuzz import values
from palimpsest.nodes import exact_text, training
from palimpsest.nodes.exact_text import spoken
from palimpsest.nodes.exact_text.nodes import TextPrompt
from palimpsest.nodes.text_control import dataset, files, fit, keeping
from palimpsest.nodes.text_control.examples import Reader, examples
from palimpsest.nodes.text_control.reading import ReadDrawn
from palimpsest.nodes.text_control.settings import TrainSettings
from palimpsest.nodes.text_control.train_node import TrainTextControl
from palimpsest.nodes.text_control.trained import ControlWeights
from safetensors.torch import load_file
from text_control import teaching
from text_control.teaching import teach, text_encoder


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    teaching.folders(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return tiny_models.unet()


@pytest.fixture(scope="module")
def clip():
    return text_encoder()


def written(folder, file):
    return load_file(str(folder / files.CONTROLS.folder / file))


def same(folder, first, second):
    a, b = written(folder, first), written(folder, second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def sampled(model):
    with torch.inference_mode():
        return harness.sample_noise(model, None, steps=2)


# ---- what learns


def test_control_and_embeddings_learn_and_nothing_else(model, clip, folder):
    before, weights = sampled(model), {n: w.clone() for n, w in clip.cond_stage_model.state_dict().items()}
    control, embedder, _, _, report, file = teach(model, clip, steps=6)
    content = written(folder, file)
    for name in ("zero_convs.0.0.weight", "fuse_block.weight", "middle_block_out.0.weight"):
        assert content[f"control_model.{name}"].abs().max() > 0, name
    assert content["embedding_manager.proj.0.weight"].abs().max() > 0
    assert torch.equal(sampled(model), before)
    assert all(torch.equal(w, weights[n]) for n, w in clip.cond_stage_model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in clip.cond_stage_model.modules())
    assert "6 steps" in report and "3 pictures, 3 lines" in report and file in report
    assert embedder.width == 24
    assert control.control_model.layout.context_dim == 24


def test_every_weight_gets_a_gradient(model, clip, monkeypatch):
    kept = {}
    real = fit.FitTextControl.take

    def take(self, step, batches):
        real(self, step, batches)
        kept.update({name: t.grad is not None and bool(t.grad.abs().max() > 0) for name, t in self.named().items()})

    monkeypatch.setattr(fit.FitTextControl, "take", take)
    teach(model, clip, steps=4, accumulation=2)
    without = sorted(name for name, found in kept.items() if not found)
    assert without == []


def test_what_comes_out_is_what_load_anytext_reads(model, clip, folder):
    control, embedder, *_, file = teach(model, clip)
    parts = files.read(files.path_of(file))
    again = files.control_of(parts).control_model.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in control.control_model.state_dict().items())
    strips = exact_text.lines_at(["CAT"], [torch.tensor(teaching.BOX)], (64, 64), exact_text.BUILT_IN).strips
    assert torch.equal(embedder.embed(strips), files.embedder_of(parts).embed(strips))
    assert parts.info["steps"] == 3 and parts.info["settings"]["learning_rate"] == 1e-2


def test_it_goes_on_from_a_control_that_was_loaded(model, clip, folder):
    control, embedder, *_, file = teach(model, clip)
    more = teach(model, clip, control_net=control, text_embedder=embedder, learning_rate=0.0)
    assert same(folder, file, more[-1])
    assert not same(folder, file, teach(model, clip, control_net=control, text_embedder=embedder)[-1])


def test_it_learns_what_it_is_shown(model, clip, folder, monkeypatch):
    """The same picture, noise and level in every step: the loss falls."""
    teaching.write(folder / "input" / dataset.FOLDER / "one", teaching.RECORDS[:1])
    real = training.generator_at
    monkeypatch.setattr(fit.training, "generator_at", lambda seed, what, *rest: real(seed, what))
    report = teach(model, clip, folder="one", steps=20, learning_rate=3e-3)[4]
    early, late = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", report).groups())
    assert late < 0.985 * early  # the small U-Net says little whatever it is told


def test_a_lora_on_the_model_acts_while_it_learns_and_on_the_clip_too(clip, folder):
    model = tiny_models.unet()
    other, _ = comfy.sd.load_lora_for_models(model, None, tiny_models.lora(model), 1.0, 0.0)
    assert not same(folder, teach(model, clip)[-1], teach(other, clip)[-1])


def test_a_new_control_begins_from_the_models_file_though_a_lora_of_another_branch_is_loaded():
    model = tiny_models.unet()
    before = ControlWeights.begin(model, None, 0).named()
    branch, _ = comfy.sd.load_lora_for_models(model, None, tiny_models.lora(model), 1.0, 0.0)
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q
    kept = layer.weight.detach().clone()
    sampled(branch)
    assert not torch.equal(layer.weight, kept)  # the branch's LoRA lies in the network that both share
    for loaded in (model, branch):
        after = ControlWeights.begin(loaded, None, 0).named()
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_the_guidance_of_other_nodes_does_not_act_while_it_learns(model, clip, folder):
    *_, report, file = teach(harness.guided(model), clip)
    assert same(folder, teach(model, clip)[-1], file)
    assert "left out (PerturbedAttentionGuidance)" in report


def lora_of_text(clip):
    """The content of a LoRA file for the attention of a text encoder."""
    drawn, content = torch.Generator().manual_seed(6), {}
    for name, weight in clip.cond_stage_model.named_parameters():
        if ".encoder.layers." in name and "self_attn" in name and weight.ndim == 2:
            key = "lora_te_" + name.split(".transformer.")[1].removesuffix(".weight").replace(".", "_")
            content[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=drawn)
            content[f"{key}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=drawn)
            content[f"{key}.alpha"] = torch.tensor(2.0)
    return content


def test_a_loras_text_encoder_part_changes_how_lines_are_read_and_strength_0_does_not(model, clip):
    """A LoRA that was trained with its text encoder alters what a line's token becomes."""
    content = tiny_models.lora(model) | lora_of_text(clip)
    lines = exact_text.lines_at(["CAT"], [torch.tensor(teaching.BOX)], (64, 64), exact_text.BUILT_IN)
    embedder = values.text_embedder()

    def said(encoder):
        given = {"clip": encoder, "text": 'a sign "CAT"', "text_lines": lines, "text_embedder": embedder}
        with torch.inference_mode():
            return tiny_models.execute(TextPrompt, **given)[0][0][0]

    changed, silent = comfy.sd.load_lora_for_models(model, clip, content, 1.0, 0.0)
    _, loud = comfy.sd.load_lora_for_models(model, clip, content, 1.0, 1.0)
    assert torch.equal(said(silent), said(clip))
    harness.assert_acts(said(loud), said(clip))
    harness.assert_acts(sampled(changed), sampled(model))


# ---- its habits


def test_the_same_seed_is_the_same_file_whatever_was_drawn_before(model, clip, folder):
    first = teach(model, clip)[-1]
    torch.manual_seed(77)
    assert same(folder, first, teach(model, clip)[-1])
    assert not same(folder, first, teach(model, clip, seed=1)[-1])


def test_checkpointing_changes_nothing(model, clip, folder):
    assert same(folder, *(teach(model, clip, checkpointing=how)[-1] for how in (True, False)))


def test_a_resumed_training_ends_as_one_that_was_never_stopped(model, clip, folder):
    settings = {"steps": 5, "save_every": 2, "keep_state": "with every file", "accumulation": 2}
    whole = teach(model, clip, **settings)[-1]
    states = sorted(path.name for path in (folder / keeping.STATES.folder).glob("*_[24].safetensors"))
    assert len(states) == 2
    for state in states:
        *_, report, file = teach(model, clip, resume=state, **settings)
        assert same(folder, whole, file)
        assert "steps after" in report


def test_a_longer_training_goes_on_from_a_shorter_ones_end(model, clip, folder):
    teach(model, clip, steps=2)
    (state,) = (path.name for path in (folder / keeping.STATES.folder).glob("*.safetensors"))
    assert same(folder, teach(model, clip, steps=4, resume=state)[-1], teach(model, clip, steps=4)[-1])
    with pytest.raises(ValueError, match="seed 0 then, 5 now"):
        teach(model, clip, seed=5, resume=state)


def test_a_cancelled_training_keeps_what_it_learned(model, clip, folder, monkeypatch):
    def cancel(self, step):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(fit.FitTextControl, "after", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        teach(model, clip, filename="half")
    assert files.read(str(folder / files.CONTROLS.folder / "half_00001.safetensors")).info["steps"] == 2
    assert not any(m._forward_pre_hooks for m in clip.cond_stage_model.modules())


def test_previews_are_drawn_and_read(model, clip, monkeypatch):
    encoded, encode = [], fit.FitTextControl.encode
    monkeypatch.setattr(fit.FitTextControl, "encode", lambda self, one: encoded.append(one) or encode(self, one))
    *_, sheet, report, _ = teach(model, clip, preview_every=1, steps=2, batch_size=1)
    assert sheet.shape[3] == 3 and sheet.shape[1] > 256
    assert "of 3 lines of the last previews read exactly" in report
    assert len(encoded) == 2 * (1 + 2 * fit.PREVIEWED)  # each text of a preview once, beside the empty one


# ---- reading as a loss


class ReadableVAE(teaching.SmallVAE):
    """A VAE whose decoder has a gradient, as the host keeps it."""

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(1))

        def decode(self, latent):
            return torch.nn.functional.interpolate(latent[:, :3] * self.gain / 4, scale_factor=8, mode="bilinear")

    def __init__(self):
        self.first_stage_model = self.Decoder()
        self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, tiny_models.CPU, tiny_models.CPU)


def test_what_is_read_counts_where_it_should(model, clip, folder):
    plain = teach(model, clip, vae=ReadableVAE())[-1]
    assert not same(folder, plain, teach(model, clip, vae=ReadableVAE(), reading_weight=5.0)[-1])
    assert not any(parameter.grad is not None for parameter in exact_text.shipped_recogniser().parameters())


def test_the_decoder_with_a_gradient_is_the_hosts(pocket_vae):
    reading = ReadDrawn(pocket_vae, None, lambda latent: latent)
    with torch.inference_mode():
        latents = pocket_vae.encode(tiny_models.picture())
        wanted = pocket_vae.decode(latents)
    given = latents.clone().requires_grad_(True)
    found = reading.decode(given)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-4)
    found.mean().backward()
    assert given.grad.abs().max() > 0


def test_a_vae_without_a_decoder_of_the_hosts_is_named(model, clip):
    with pytest.raises(ValueError, match=r"reading_weight is 0\.01 and the connected VAE has no decoder"):
        teach(model, clip, reading_weight=0.01)


# ---- the folder


def test_a_folder_is_read_as_it_is_written(model, folder):
    texts = dataset.read_texts(teaching.NAME)
    assert [len(record.lines) for record in texts.records] == [1, 2, 1]
    reader = Reader(exact_text.shipped_recogniser())
    with torch.inference_mode():
        found = list(examples(model, teaching.SmallVAE(), texts, reader, TrainSettings(resolution=64), print))
    first, second, third = found
    assert first.prompt == "a sign that says  *" and first.order == [0]
    assert second.prompt == "two signs, that reads * , *" and second.order == [0, 1]
    assert first.necks.shape == (1, 40, 64) and third.necks.shape == (0, 40, 64)
    assert first.where is None and third.where[0, 0, 6].eq(0).any() and third.where[0, 0, 0].eq(1).all()
    assert torch.equal(first.hint(blank=True)[:, :320], first.hint(blank=False)[:, :320])
    grey = model.model.process_latent_in(teaching.SmallVAE().encode(torch.full((1, 64, 64, 3), 0.5)))
    torch.testing.assert_close(first.hint(blank=True)[:, 320:], grey)
    assert not torch.equal(first.masked, first.latent)


def test_pictures_of_other_sizes_keep_their_texts_in_place(model, folder):
    wide = {"caption": "x", "lines": [{"text": "AB", "polygon": [[0, 0], [200, 0], [200, 50], [0, 50]]}]}
    teaching.write(folder / "input" / dataset.FOLDER / "wide", [wide], size=(400, 100))
    reader = Reader(exact_text.shipped_recogniser())
    with torch.inference_mode():
        texts = dataset.read_texts("wide")
        (found,) = examples(model, teaching.SmallVAE(), texts, reader, TrainSettings(resolution=128), print)
    height, width = found.bucket
    assert width > height
    corner = found.lines[0].polygon.amax(0)
    torch.testing.assert_close(corner, torch.tensor([width * 4.0, height * 4.0]), rtol=0, atol=2)


def test_captions_and_lines_meet():
    assert spoken('a "CAT" and a "DOG"', ["DOG", "CAT"]) == ("a  *  and a  *", [1, 0])
    assert spoken('a "CAT".', ["CAT", "CAT"]) == ("a  * , that reads *", [0, 1])
    assert spoken('5 * 3 is "many"', []) == ("5   3 is many", [])
    assert spoken("a wall.", ["A", "B"]) == ("a wall, that reads * , *", [0, 1])
    assert spoken('an open "quote', ["quote"]) == ("an open quote, that reads *", [0])


def a_line(**changes):
    return json.dumps({"picture": "x.png", "caption": "a", "lines": [{"text": "A", "polygon": teaching.BOX} | changes]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of signs/texts.jsonl cannot be read"),
        ('{"picture": "../x.png", "caption": "a"}', "does not lie in the dataset's folder"),
        ('{"picture": "x.png", "caption": "a", "lines": [{"text": "A"}]}', "'polygon'"),
        (a_line(polygon=[[0, 0], [1, 1e99], [2, 2]]), "3 to 64"),
        (a_line(polygon=[[0, 0], [9, 0], [5, 0]]), "a pixel"),
        (a_line(text=5), "'text'"),
        (a_line(read=1), "'read'"),
        ('{"picture": "none.png", "caption": "a"}', "cannot be opened"),
        ("", "has no lines"),
    ],
)
def test_odd_folders_are_named(model, clip, folder, line, message):
    (folder / "input" / dataset.FOLDER / teaching.NAME / dataset.RECORDS).write_text(line)
    with pytest.raises(ValueError, match=message):
        teach(model, clip)


def test_letters_that_the_font_lacks_are_named_with_their_picture(model, clip, folder):
    record = {"picture": "pictures/0.png", "caption": "a", "lines": [{"text": "\u6c49", "polygon": teaching.BOX}]}
    (folder / "input" / dataset.FOLDER / teaching.NAME / dataset.RECORDS).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"pictures/0.png of signs"):
        teach(model, clip)


# ---- settings and refusals


def test_every_setting_reaches_its_field():
    ids = {each.id for each in TrainTextControl.define_schema().inputs}
    assert {field.name for field in fields(TrainSettings)} <= ids


def test_other_models_are_refused(clip):
    with pytest.raises(ValueError, match=r"SD 1\.x"):
        teach(tiny_models.unet("sd15-inpaint"), clip)
    with pytest.raises(ValueError):
        teach(tiny_models.unet("sdxl"), text_encoder("sdxl"))
    with pytest.raises(ValueError, match="there is no folder"):
        teach(tiny_models.unet(), clip, folder="none")
    with pytest.raises(ValueError, match="no text control"):
        teach(tiny_models.unet(), clip, control_net=tiny_models.controlnet())
    assert folder_paths.get_input_directory()


def test_nan_in_the_first_step_is_the_models(clip):
    broken = tiny_models.unet()
    with torch.inference_mode():
        broken.model.diffusion_model.out[2].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="returns NaN for these pictures"):
        teach(broken, clip)
