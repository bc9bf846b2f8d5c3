"""A transformer's record in a file: the same edit from it as from the nodes, and what is refused."""

import json
from dataclasses import replace

import comfy.samplers
import folder_paths
import pytest
import tiny_models
import torch
from comfy_extras import nodes_custom_sampler
from harness import assert_acts, assert_close
from kv.test_transformers import apply, drawn, learned, tune
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv import files as kv_files
from palimpsest.nodes.kv.nodes import LoadKV, SaveKV
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_transformers import latent, own_run, prompt

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/palimpsest_kv that the host knows."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, kv_files.SHELF.folder, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def saved_and_loaded(kv, model=None):
    return LoadKV.execute(SaveKV.execute(kv, "picture").args[0], model).args


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen", "zimage", "sd3"])
def test_an_edit_from_a_file_is_the_edit(models, folder, family):
    model = models(family)
    trajectory, plain = own_run(model, family)
    kv = tune(model, trajectory, family)[0]
    read, report, noise, found = saved_and_loaded(kv, model)
    assert read.source is None
    assert kv.family in report
    assert "modes extend, frozen" in report
    assert torch.equal(read.trajectory.latents, trajectory.latents)
    assert (read.layers, read.levels, read.layout) == (kv.layers, kv.levels, kv.layout)
    for mode in ("extend", "frozen"):
        of_both = (drawn(apply(model, each, mode=mode), family, text=3) for each in (kv, read))
        assert torch.equal(*of_both)
    assert_acts(drawn(apply(model, read), family, text=3), drawn(model, family, text=3))
    assert torch.equal(drawn(apply(model, read, mode="frozen"), family), plain)
    assert noise["samples"].shape == latent(family).shape
    start = found.generate_noise({"samples": latent(family)})
    assert_close(start.flatten(), trajectory.latents[0].flatten() / trajectory.sigmas[0])


def test_from_the_picture_to_an_edit_from_its_file(models, folder):
    """Invert Picture, Tune KV, Save KV; then Load KV alone, as the workflow is wired."""
    model, family = models("zimage"), "zimage"
    picture = torch.randn(latent(family).shape, generator=torch.Generator().manual_seed(3))
    given = {"positive": prompt(family, 1), "steps": 4, "scheduler": "simple"}
    inverted = tiny_models.execute(Invert, model=model, latent={"samples": picture}, **given)
    trajectory, noise, rebuilt, _, found = inverted
    kv = tune(model, trajectory, family)[0]
    read, _, again, found_again = saved_and_loaded(kv, model)
    assert torch.equal(again["samples"], noise["samples"])

    def edited(patched, text, noise, empty):
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(prompt(family, text), prompt(family, 2))
        guider.set_cfg(1.0)
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor(trajectory.sigmas)
        run = nodes_custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, empty)
        return run.args[0]["samples"]

    assert torch.equal(edited(model, 1, found_again, again), edited(model, 1, found, noise))
    assert_close(edited(model, 1, found_again, again), rebuilt["samples"])
    edit = edited(apply(model, read), 3, found_again, again)
    assert torch.equal(edit, edited(apply(model, kv), 3, found, noise))
    assert_acts(edit, edited(model, 3, found, noise))


def test_a_prompt_comes_back_with_all_that_stands_beside_it(models, folder):
    model, family = models("flux"), "flux"
    beside = {
        "guidance": 3.5,
        "attention_mask": torch.ones(1, 9, dtype=torch.int64),
        "reference_latents": [torch.zeros(1, 16, 4, 4), torch.ones(1, 16, 2, 4)],
        "unet_type": None,
        "control": object(),  # belongs to the edit
    }
    positive = [[text.to(torch.bfloat16), extra | beside] for text, extra in prompt(family, 1)]
    kv = tune(model, own_run(model, family)[0], family, positive=positive)[0]
    ((text, extra),) = saved_and_loaded(kv)[0].prompt
    assert torch.equal(text, positive[0][0])
    assert set(extra) == set(positive[0][1]) - {"control"}
    assert (extra["guidance"], extra["unet_type"]) == (3.5, None)
    assert torch.equal(extra["attention_mask"], beside["attention_mask"])
    assert [t.shape for t in extra["reference_latents"]] == [t.shape for t in beside["reference_latents"]]
    odd = [[text, extra | {"something": object()}] for text, extra in prompt(family, 1)]
    with pytest.raises(ValueError, match=r"carries 'something', which a file cannot hold: keep Tune KV"):
        SaveKV.execute(tune(model, own_run(model, family)[0], family, positive=odd)[0], "odd")
    assert len(kv_files.SHELF.listed()) == 1


def test_a_u_nets_file_gives_its_noise_as_noise(tuned, folder):
    model, _, trajectory, kv, *_ = tuned
    *_, noise, found = saved_and_loaded(kv, model)
    zeros = {"samples": torch.zeros_like(noise["samples"])}
    # the host's start of a diffusion model: noise times its level on an empty latent, here at the noisiest level
    assert_close(found.generate_noise(zeros) * start_scale(model, trajectory), trajectory.latents[0], 1e-4)
    unfitted = saved_and_loaded(kv)[-1]
    with pytest.raises(ValueError, match="connect the model to Load KV"):
        unfitted.generate_noise(zeros)


def start_scale(model, trajectory):
    """What the host multiplies noise by at the first level of a trajectory."""
    sampling, level = model.get_model_object("model_sampling"), torch.tensor([trajectory.sigmas[0]])
    most = abs(float(sampling.sigma_max) - float(level)) < 1e-4 * float(level)
    one = torch.ones(1, 1, 1, 1)
    return sampling.noise_scaling(level, one, torch.zeros_like(one), most)


def test_what_is_refused(models, folder):
    model, family = models("flux"), "flux"
    kv = tune(model, own_run(model, family)[0], family)[0]
    name = SaveKV.execute(kv, "picture").args[0]
    read = LoadKV.execute(name).args[0]
    with pytest.raises(ValueError, match=r"load the FLUX\.1 model that was inverted"):
        apply(models("zimage"), read)
    with pytest.raises(ValueError, match="take mode extend or frozen"):
        apply(model, read, mode="recompute")
    with pytest.raises(ValueError, match="connect the model that it was inverted with"):
        LoadKV.execute(name, models("zimage"))
    tensors = load_file(folder / name)
    with safe_open(folder / name, framework="pt") as file:
        header = file.metadata()
    nan = float("nan")
    for changed, more, said in (
        ({"levels": "[0.123]"}, {}, "levels are not those"),
        ({"layers": '[["double", -1]]'}, {}, "layer should be from 0 to 999"),
        ({"layers": '[["double", 77]]'}, {}, None),
        ({"prompt": "[]"}, {}, "prompt should have 1 to 64 parts"),
        ({"prompt": '[{"guidance": [0]}]'}, {}, "should say how many tensors"),
        ({"prompt": '[{"guidance": {}}]'}, {}, "should be a number or a text"),
        ({"path": "[1, true]"}, {}, "path should be true or false"),
        ({}, {"text.1": torch.zeros(1, 2, 48)}, "do not belong to it"),
        ({}, {"text.0": tensors["text.0"] * nan}, "prompt holds NaN"),
        ({}, {"latents": tensors["latents"] * nan}, "latents hold NaN"),
        ({}, {"latents": tensors["latents"][1:]}, "do not fit"),
        ({}, {"noise": tensors["noise"][..., :-1]}, "do not fit"),
        ({"sigmas": json.dumps(sorted(json.loads(header["sigmas"])))}, {}, "levels are not those|do not fall"),
    ):
        save_file(tensors | {k: t.contiguous() for k, t in more.items()}, folder / "odd.safetensors", header | changed)
        folder_paths.filename_list_cache.clear()
        if said is None:  # a layer that this model has not
            with pytest.raises(ValueError, match="name layer double 77, which FLUX"):
                apply(model, LoadKV.execute("odd.safetensors").args[0])
            continue
        with pytest.raises(ValueError, match=said):
            LoadKV.execute("odd.safetensors")


# ---- with what was learned ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux2", "qwen", "sd3", "wan"])
def test_what_was_learned_lies_in_the_file_too(models, folder, family):
    model = models(family)
    trajectory, _ = own_run(model, family)
    kv = learned(model, trajectory, family, inner_steps=3)[0]
    read, report, *_ = saved_and_loaded(kv, model)
    assert "learned in" in report
    assert "at rank 4" in report
    assert "modes extend, recompute, frozen" in report
    assert read.learned.layers == kv.learned.layers
    for mode in ("recompute", "frozen"):
        found = (drawn(apply(model, each, mode=mode), family, text=3, cfg=3.0) for each in (kv, read))
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda header, _: header.update(grids=header["grids"].replace('"number": 1', '"number": 7')), "that learned"),
        (lambda header, _: header.update(grids=header["grids"].replace("double", "input")), "a block 'input'"),
        (lambda header, _: header.update(rank="[9, 0]"), "its header do not fit"),
        (lambda header, _: header.update(span="[0, 7]"), "span"),
        (lambda header, _: header.update(info="[]"), "info"),
        (lambda _, tensors: tensors.pop("scalars"), "no tensor 'scalars'"),
        (lambda _, tensors: tensors.update({"learned.0001": tensors["learned.0001"] * torch.nan}), "NaN"),
        (lambda _, tensors: tensors.update({"learned.0009": tensors["learned.0001"].clone()}), "do not belong to it"),
    ],
)
def test_a_damaged_file_of_what_was_learned_is_named(models, folder, change, told):
    model, family = models("qwen"), "qwen"
    kv = learned(model, own_run(model, family)[0], family, inner_steps=1)[0]
    SaveKV.execute(kv, "picture")
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=told):
        LoadKV.execute(path.name)


def test_channels_of_another_width_are_named(models):
    model, family = models("qwen"), "qwen"
    kv = learned(model, own_run(model, family)[0], family, inner_steps=1)[0]
    layers = tuple(replace(layer, channels=64) for layer in kv.learned.layers)
    odd = replace(kv, learned=replace(kv.learned, layers=layers))
    with pytest.raises(ValueError, match="learned with 64 channels, Qwen-Image has 128"):
        apply(model, odd, mode="recompute")
