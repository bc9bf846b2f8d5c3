"""Networks that the pack builds of the host's layers, where the host's dynamic memory makes layers without weights."""

import pytest
import tiny_models
import torch
from palimpsest.kernels.connector import ConnectorConfig
from palimpsest.nodes import host
from palimpsest.nodes.contextdiff import files as context_files
from palimpsest.nodes.contextdiff.adapter import ContextAdapter
from palimpsest.nodes.contextdiff.config import AdapterConfig
from palimpsest.nodes.multimodal.encoder import build as build_connector
from palimpsest.nodes.text_control import control as text_control

memory = pytest.importorskip("comfy.memory_management", reason="the host is older than dynamic memory")
pytestmark = pytest.mark.usefixtures("inference")

BUILDS = {
    "context adapter": lambda: ContextAdapter.BUILD(config()),
    "connector": lambda: build_connector(ConnectorConfig(32, 64, 1, 2)),
    "text control": lambda: text_control.build(text_control.Layout.of(tiny_models.unet()), torch.float32, "meta"),
}


def config():
    return AdapterConfig("SD15", 4, 768, width=32, depth=1, heads=4)


@pytest.fixture
def dynamic(monkeypatch):
    """As on a GPU with the host's dynamic memory, as far as the making of layers goes."""
    monkeypatch.setattr(memory, "aimdo_enabled", True)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_networks_tell_all_their_weights(build, monkeypatch):
    wanted = {name: tensor.shape for name, tensor in build().state_dict().items()}
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    assert {name: tensor.shape for name, tensor in build().state_dict().items()} == wanted


def test_a_network_begins_from_its_seed_and_comes_back_from_a_file(dynamic, tmp_path, monkeypatch):
    made = ContextAdapter.new(config(), seed=3)
    with torch.inference_mode(False):
        assert all(p.requires_grad for p in made.trainable().parameters())
    context_files.save_adapter(made, tmp_path / "a.safetensors")
    again = context_files.load_adapter(str(tmp_path / "a.safetensors")).weights()
    monkeypatch.setattr(memory, "aimdo_enabled", False)
    for name, tensor in ContextAdapter.new(config(), seed=3).weights().items():
        assert torch.equal(tensor, again[name])


def test_layers_are_the_hosts_in_all_else(dynamic):
    import comfy.ops

    layers = host.whole(comfy.ops.manual_cast)
    assert layers.Conv2d is comfy.ops.manual_cast.Conv2d
    linear, table = layers.Linear(4, 8), layers.Embedding(5, 4)
    assert isinstance(linear, comfy.ops.manual_cast.Linear)
    linear.load_state_dict({"weight": torch.ones(8, 4), "bias": torch.zeros(8)})
    table.load_state_dict({"weight": torch.ones(5, 4)})
    assert torch.equal(linear(table(torch.tensor([2]))), torch.full((1, 8), 4.0))
    with pytest.raises(RuntimeError, match="Missing key"):
        linear.load_state_dict({"weight": torch.ones(8, 4)})
