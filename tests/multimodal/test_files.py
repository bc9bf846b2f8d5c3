"""Connectors on disk, and back under the host's memory management."""

from dataclasses import replace

import pytest
import tiny_vlm
import torch
from palimpsest.nodes.multimodal import files as multimodal_files
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
