"""dev.py gpu: what it runs where a GPU is at hand, in small on a CPU."""

import argparse
import json
import sys
from pathlib import Path

import on_gpu
import pytest
import torch


@pytest.mark.parametrize("part", on_gpu.MEASURED)
def test_what_is_measured_in_this_process(part):
    found = on_gpu.MEASURED[part](torch.device("cpu"), tiny=True)["milliseconds"]
    numbers = [n for value in found.values() for n in (value.values() if isinstance(value, dict) else [value])]
    assert numbers
    assert min(numbers) > 0


def test_a_part_that_fails_is_noted_and_the_next_one_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        on_gpu.COMMANDS, "latents", lambda *_: [sys.executable, "-c", "print('no room'); raise SystemExit(3)"]
    )
    monkeypatch.setitem(on_gpu.COMMANDS, "unet", lambda *_: [sys.executable, "-c", "print('step 2')"])
    monkeypatch.setattr(
        sys, "argv", ["gpu", "--device", "cpu", "--parts", "latents", "unet", "--output", str(tmp_path)]
    )
    assert on_gpu.main() == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (parts["latents"]["error"], parts["latents"]["said"]) == ("exit code 3", ["no room"])
    assert parts["unet"]["said"] == ["step 2"]
    assert "error" not in parts["unet"]


def test_commands_go_on_from_the_given_weights():
    options = argparse.Namespace(device="cuda", tiny=False, init=Path("weights"))
    command = on_gpu.COMMANDS["unet"](options, Path("work"), 120.0)
    assert command[command.index("--init") + 1] == str(Path("weights/unet.safetensors"))
    assert command[command.index("--minutes") + 1] == "2.00"
    assert abs(sum(on_gpu.SHARES.values()) - 1) < 1e-9


def test_only_what_is_small_enough_comes_back(tmp_path, monkeypatch):
    work, output = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    output.mkdir()
    (work / "cost.md").write_text("rows")
    (work / "unet.safetensors").write_bytes(bytes(20))
    monkeypatch.setattr(on_gpu, "MOST_BYTES", 10)
    on_gpu.bring(work, output)
    assert [path.name for path in output.iterdir()] == ["cost.md"]
