"""Connectors on disk, and back under the host's memory management."""

import json
from dataclasses import asdict, replace

import pytest
import tiny_vlm
import torch
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal.training import files as training_files
from safetensors.torch import load_file, save_file

WIDTH = 24  # channels of a connector's token

pytestmark = pytest.mark.usefixtures("inference")


def test_a_connector_survives_its_file(encoder_folders, loaded):
    made = tiny_vlm.connector(loaded(), pooled=1280)
    made = replace(made, info={"steps": 3, "loss": 0.25})
    path = multimodal_files.new_path("my dog")
    multimodal_files.save_connector(made, path)
    again = multimodal_files.load_connector(str(path))
    assert (again.config, again.reads, again.info) == (made.config, made.reads, made.info)
    states = loaded().hidden_states([("a dog",)]).states
    for one, same in zip(made(states), again(states), strict=True):
        assert torch.equal(one, same)
    assert path.name in multimodal_files.listed()


def test_a_foreign_and_a_damaged_file_are_refused(encoder_folders, loaded, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors is not a multimodal connector"):
        multimodal_files.load_connector(str(tmp_path / "lora.safetensors"))
    path = tmp_path / "cut.safetensors"
    multimodal_files.save_connector(tiny_vlm.connector(loaded()), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut off or damaged"):
        multimodal_files.load_connector(str(path))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda tensors: tensors.pop("norm_out.weight"), "norm_out.weight for one"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "more for one"),
        (lambda tensors: tensors["project.weight"].fill_(torch.nan), "NaN"),
        (
            lambda tensors: tensors.update({"project.bias": torch.zeros(WIDTH, dtype=torch.float16)}),
            "one type of number",
        ),
    ],
)
def test_a_file_whose_tensors_do_not_fit_is_refused(loaded, tmp_path, spoil, says):
    made, path = tiny_vlm.connector(loaded()), tmp_path / "odd.safetensors"
    multimodal_files.save_connector(made, path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=says):
        multimodal_files.load_connector(str(path))


def saved_with(tmp_path, connector, **header):
    """A connector's file with some of its header changed."""
    tensors, said = multimodal_files.content(connector)
    path = tmp_path / "odd.safetensors"
    mark = {"format": multimodal_files.SHELF.format, "version": "1"}
    changed = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    save_file(tensors, path, metadata=mark | said | changed)
    return str(path)


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("config", {"depth": "2"}, "config's depth should be a whole number, it is '2'"),
        ("config", {"depth": 0}, "depth must be from 1 to 128, it is 0"),
        ("config", {"hidden_width": 10**12}, "config's hidden_width should be from 0"),
        ("config", {"pooled_width": -1}, "config's pooled_width should be from 0"),
        ("config", {"context_width": 48}, "do not fit its layout"),
        ("config", {"evil": 1}, "config has 'evil'"),
        ("reads", {"tokens": 0}, "reads's tokens should be from 1 to 65536, it is 0"),
        ("reads", {"tokens": 2.0}, "reads's tokens should be a whole number, it is 2.0"),
        ("reads", {"perceiver": "no"}, "reads's perceiver should be true or false"),
        ("reads", {"mark": None}, "reads's mark should be a text"),
    ],
)
def test_a_header_of_nonsense_is_refused_with_what_is_wrong(loaded, tmp_path, part, changes, says):
    made = tiny_vlm.connector(loaded())
    with pytest.raises(ValueError, match=says):
        multimodal_files.load_connector(saved_with(tmp_path, made, **{part: asdict(getattr(made, part)) | changes}))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"info": "[]"}, "its info should be a record"),
        ({"info": {"steps": 1.5}}, "info's steps should be a whole number"),
        ({"info": "[" * 100_000}, "its info"),
        ({"reads": "null"}, "its reads should be a record"),
        ({"config": "{"}, "its config cannot be read"),
        ({"version": "\u00b9"}, "early version"),
    ],
)
def test_other_nonsense_is_refused_too(loaded, tmp_path, header, says):
    with pytest.raises(ValueError, match=says):
        multimodal_files.load_connector(saved_with(tmp_path, tiny_vlm.connector(loaded()), **header))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"steps": torch.tensor([1, 2])}, "its steps .* do not fit"),
        ({"steps": torch.tensor(2.5)}, "its steps holds F32 numbers"),
        ({"steps": torch.tensor(-1)}, "has taken -1 steps"),
        ({"steps": None}, "no tensor 'steps'"),
        ({"a|exp_avg": torch.zeros(2)}, r"its a\|exp_avg \(2,\) and its header do not fit"),
        ({"a|step": torch.zeros(2)}, r"its a\|step \(2,\) and its header do not fit"),
        ({"b|exp_avg": torch.zeros(3)}, "belongs to nothing in it"),
        ({"a|evil": torch.zeros(3)}, "belongs to nothing in it"),
        ({"a": torch.full((3,), torch.nan)}, "NaN or infinite"),
    ],
)
def test_the_state_of_a_training_is_held_to_its_form(tmp_path, changes, says):
    whole = {"steps": torch.tensor(3), "a": torch.ones(3), "a|exp_avg": torch.ones(3), "a|step": torch.tensor(3.0)}
    path = tmp_path / "state.safetensors"
    mark = {"format": training_files.STATES.format, "version": "1", "info": "{}"}
    save_file({k: v for k, v in (whole | changes).items() if v is not None}, path, metadata=mark)
    if says is None:
        assert int(training_files.load_state(str(path))["steps"]) == 3
    else:
        with pytest.raises(ValueError, match=says):
            training_files.load_state(str(path))


def test_a_trainable_copy_is_apart_and_has_a_gradient(loaded):
    made = tiny_vlm.connector(loaded())
    states = loaded().hidden_states([("a dog",), ("a red cat sitting",)])
    with torch.inference_mode(False), torch.enable_grad():
        network = made.trainable()
        context, _ = network(states.states.float().clone(), states.mask.clone())
        context.square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
        with torch.no_grad():
            network.project.weight.zero_()
    assert torch.count_nonzero(made.patcher.model.project.weight) > 0
