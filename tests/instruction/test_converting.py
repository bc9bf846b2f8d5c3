"""The converter of the published files: small ones of their layout, which Load MGIE then reads."""

import json
import sys

import pytest
import tiny_mgie
import torch
from palimpsest.nodes.instruction import loading
from palimpsest.nodes.instruction.folder import MgieFolder
from palimpsest.nodes.instruction.llava import load_mgie
from recipes import convert_mgie
from safetensors.torch import load_file, save_file


@pytest.fixture
def published(tmp_path):
    """LLaMA, LLaVA's difference to it, CLIP, and MGIE's two pickles, small and random: (folder, weights of LLaVA)."""
    made, vision, projector, language, head, embeddings = tiny_mgie.parts()
    for name in ("llama", "delta", "clip"):
        (tmp_path / name).mkdir()
    rows = len(made) - 8  # LLaVA has no [IMG0..7] yet, LLaMA no <im_start> either
    llava = {k: (t[:rows] if t.shape[:1] == (len(made),) else t).clone() for k, t in language.state_dict().items()}
    llava |= {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    llama = {
        k: torch.randn_like(t[: rows - 3] if t.shape[:1] == (rows,) else t) for k, t in llava.items() if "mm_" not in k
    }
    delta = {k: t.clone() for k, t in llava.items()}
    for name, tensor in llama.items():
        delta[name][: len(tensor)] -= tensor
    save_file(llama, tmp_path / "llama" / "model.safetensors")
    torch.save(delta, tmp_path / "delta" / "pytorch_model.bin")
    made.save_pretrained(tmp_path / "delta")
    config = language.config.to_dict() | {"model_type": "llava", "mm_vision_tower": "x", "vocab_size": rows}
    (tmp_path / "delta" / "config.json").write_text(json.dumps(config, default=str))
    tower = {k.removeprefix("vision_model."): t.contiguous() for k, t in vision.state_dict().items()}
    save_file({f"vision_model.{k}": t for k, t in tower.items()}, tmp_path / "clip" / "model.safetensors")
    clip = {"model_type": "clip", "vision_config": vision.config.to_dict()}
    (tmp_path / "clip" / "config.json").write_text(json.dumps(clip, default=str))
    tables = {name: language.state_dict()[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    edit = {f"edit_head.{k}": t for k, t in head.state_dict().items()}
    torch.save(tables | edit | {"emb": embeddings[None]}, tmp_path / "mllm.pt")
    torch.save({"conv_in.weight": torch.zeros(32, 8, 3, 3)}, tmp_path / "unet.pt")
    return tmp_path, llava, head


def convert(folder, monkeypatch, *more: str) -> None:
    given = ["--llama", "llama", "--llava-delta", "delta", "--vision", "clip", "--out", "out", *more]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["convert_mgie.py", *given])
    convert_mgie.main()


def test_what_is_written_is_what_load_mgie_reads(published, monkeypatch):
    folder, llava, head = published
    convert(folder, monkeypatch, "--mllm", "mllm.pt", "--unet", "unet.pt")
    made = MgieFolder(folder / "out")
    model = load_mgie(made, "float32")
    state = model.llava.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(state[f"language.{name}"], llava[name], rtol=1e-3, atol=1e-3)
    assert state["language.lm_head.weight"].shape[0] == len(model.tokenizer)
    trained = loading.head_in(made)
    network, embeddings = trained.network, trained.embeddings
    torch.testing.assert_close(network.query, head.query, rtol=1e-3, atol=1e-3)
    assert embeddings.shape == (8, 32)
    assert load_file(folder / "out" / "unet.safetensors")["conv_in.weight"].shape == (32, 8, 3, 3)
    assert "CC-BY-NC" in (folder / "out" / "LICENCE.txt").read_text()


class Code:
    """What a pickle can do when it is read."""

    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_that_would_run_code_is_not_read(published, monkeypatch, capsys):
    folder, *_ = published
    torch.save({"emb": Code()}, folder / "mllm.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        convert(folder, monkeypatch, "--mllm", "mllm.pt")
    assert "run" not in capsys.readouterr().out.split("\n")


def test_other_files_are_named(published, monkeypatch):
    folder, *_ = published
    torch.save({"conv_in.weight": torch.zeros(32, 4, 3, 3)}, folder / "unet.pt")
    with pytest.raises(SystemExit, match="a first convolution of 4 channels"):
        convert(folder, monkeypatch, "--unet", "unet.pt")
    torch.save({"emb": torch.zeros(8, 32)}, folder / "mllm.pt")
    with pytest.raises(SystemExit, match=r"holds no edit_head\.query"):
        convert(folder, monkeypatch, "--mllm", "mllm.pt")
