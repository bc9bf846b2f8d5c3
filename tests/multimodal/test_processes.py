"""The recipe for several GPUs, on a CPU with two processes: it learns what one process learns from the same batch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import tiny_vlm
import torch
from palimpsest.nodes.multimodal import dataset as interleaved_dataset
from palimpsest.nodes.multimodal.training.settings import TrainSettings
from recipes import train_multimodal
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent.parent
MODELS = Path(os.environ.get("PALIMPSEST_MODELS", TESTS.parent / ".dev" / "models"))
CHECKPOINT = MODELS / "checkpoints" / "palimpsest_pocket.safetensors"


def test_the_recipe_takes_every_setting_and_refuses_words_that_none_has(capsys):
    paths = [text for name in ("comfyui", "checkpoint", "encoder", "dataset", "out") for text in (f"--{name}", "x")]
    chosen = train_multimodal.arguments(TrainSettings, [*paths, "--weighting", "SNR + 1", "--schedule", "linear"])
    assert (chosen.weighting, chosen.schedule, chosen.pooled_output) == ("SNR + 1", "linear", "zeros")
    with pytest.raises(SystemExit):
        train_multimodal.arguments(TrainSettings, [*paths, "--schedule", "cosin"])
    assert "cosine with restarts" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate: pip install accelerate")
@pytest.mark.skipif(not CHECKPOINT.is_file(), reason="needs the pocket checkpoint: run python dev.py demo")
def test_two_processes_learn_what_one_learns_with_twice_the_batch(tmp_path):
    """Weights, LoRA factors and the optimiser's state."""
    tiny_vlm.write(tmp_path / "vlm")
    mask = torch.zeros(1, 64, 64)
    mask[0, 8:50, 8:50] = 1
    (tmp_path / "data").mkdir()
    finder = interleaved_dataset.ByMask([mask] * 4, [("dog",)] * 4)
    captions = ["a dog in the snow"] * 4
    interleaved_dataset.build_dataset(
        tmp_path / "data", tiny_models.picture(4), captions, finder, interleaved_dataset.Recipe(4), ("sketch",)
    )
    states = []
    for processes in (1, 2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes,
            TESTS / "recipes" / "train_multimodal.py", "--cpu", "--comfyui", os.environ["COMFYUI_PATH"],
            "--checkpoint", CHECKPOINT, "--encoder", tmp_path / "vlm", "--dataset", tmp_path / "data",
            "--out", tmp_path / str(processes), "--name", "it", "--steps", 2, "--batch-size", 2 // processes,
            "--tokens", 4, "--depth", 2, "--train-unet", "--train-language", "--warmup", 0, "--preview-every", 0,
            "--dtype", "float32", "--connector-rate", 1e-3, "--unet-rate", 1e-3, "--language-rate", 1e-3,
        ]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        states.append(load_file(tmp_path / str(processes) / "palimpsest_trainings" / "it_00001.safetensors"))
    one, two = states
    assert one.keys() == two.keys()
    for part in ("network", "unet", "language"):
        for word in ("", "|exp_avg", "|exp_avg_sq"):
            names = [n for n in one if n.startswith(part) and (n.endswith(word) if word else "|" not in n)]
            whole, halves = (torch.cat([state[name].double().flatten() for name in names]) for state in states)
            assert float((whole - halves).norm()) < 1e-4 * float(whole.norm()), (part, word)
