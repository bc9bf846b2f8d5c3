"""Short trainings of instruction models on tiny ones, as their tests need them."""

from __future__ import annotations

import folder_paths
import tiny_models
from lora_training import teaching
from lora_training.teaching import SmallVAE, execute_on_lists
from palimpsest.nodes.instruction_training import files
from palimpsest.nodes.instruction_training.nodes import TrainInstruction

INSTRUCTIONS = ("make it blue", "let it rest", "make it (winter)", "move it to the other side")
LISTS = ("pictures", "results", "instructions", "masks", "expressed")
FOLDERS = ("loras", "diffusion_models", "palimpsest_blend", "palimpsest_edit_heads", files.STATES.folder)
SHORT = {
    "steps": 4, "resolution": 64, "rank": 4, "alpha": 4.0, "learning_rate": 1e-2, "preview_every": 0, "save_every": 0,
    "accumulation": 2, "checkpointing": False,
}  # fmt: skip


def pictures(first: int = 0):
    """Four pictures of two sizes."""
    return [*(tiny_models.picture(seed=first + i) for i in range(3)), tiny_models.picture(1, 64, 150, seed=first + 9)]


def teach(model, clip, **changes):
    """(model, plot, sheet, report, file)."""
    return teach_head(model, clip, **changes)[:5]


def teach_head(model, clip, **changes):
    """(model, plot, sheet, report, file, edit head)."""
    values = {"model": model, "clip": clip, "vae": SmallVAE()}
    values |= {"pictures": pictures(), "results": pictures(20), "instructions": list(INSTRUCTIONS)}
    return execute_on_lists(TrainInstruction, LISTS, values | SHORT | changes)


def use_folders(monkeypatch, folder):
    """Let what is written go to a folder of the test."""
    teaching.use_folders(monkeypatch, folder, FOLDERS)
    for name in ("output", "input"):
        (folder / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(folder / name))
