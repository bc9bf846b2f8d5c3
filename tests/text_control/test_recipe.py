"""The converter of pickled checkpoints: what it keeps, and what it refuses."""

import pickle

import pytest
import tiny_models
import torch
from palimpsest.nodes.text_control import files
from palimpsest.nodes.text_control.control import Layout
from recipes import anytext_to_safetensors
from text_control import writing


def test_a_pickled_checkpoint_becomes_a_file_that_loads(tmp_path, monkeypatch):
    layout = Layout.of(tiny_models.unet())
    monkeypatch.setattr(files, "PUBLISHED", layout)
    content = writing.published(layout, dtype=torch.float32)
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "anytext_v1.1.ckpt")
    anytext_to_safetensors.main([str(tmp_path / "anytext_v1.1.ckpt")])
    parts = files.read(str(tmp_path / "anytext_v1.1.safetensors"))
    wanted = content["control_model.fuse_block.weight"].half()
    assert torch.equal(parts.control["input_hint_block.fuse_block.weight"], wanted)
    assert parts.projection.keys() == {"weight", "bias"}
    with pytest.raises(SystemExit, match="there already"):
        anytext_to_safetensors.main([str(tmp_path / "anytext_v1.1.ckpt")])


class Program:
    def __reduce__(self):
        return print, ("it ran",)


def test_what_runs_programs_is_not_opened(tmp_path, capsys):
    (tmp_path / "odd.ckpt").write_bytes(pickle.dumps({"state_dict": Program()}))
    with pytest.raises(SystemExit, match="was not read"):
        anytext_to_safetensors.main([str(tmp_path / "odd.ckpt")])
    torch.save({"a": torch.ones(1)}, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match="no AnyText checkpoint"):
        anytext_to_safetensors.main([str(tmp_path / "other.ckpt")])
    assert "it ran" not in capsys.readouterr().out
