"""Short trainings of a text control on tiny models, as their tests need them."""

from __future__ import annotations

import json

import folder_paths
import tiny_models
import torch
from lora_training.teaching import SmallVAE, text_encoder, use_folders
from palimpsest.nodes.text_control import dataset, files, keeping
from palimpsest.nodes.text_control.train_node import TrainTextControl
from PIL import Image

NAME = "signs"
SHORT = {
    "steps": 3, "batch_size": 2, "accumulation": 1, "learning_rate": 1e-2, "resolution": 64, "save_every": 0,
    "preview_every": 0, "checkpointing": False,
}  # fmt: skip
BOX = [[4, 8], [60, 8], [60, 28], [4, 28]]
LOW = [[6, 40], [58, 40], [58, 60], [6, 60]]
RECORDS = (
    {"caption": 'a sign that says "CAT"', "lines": [{"text": "CAT", "polygon": BOX}]},
    {"caption": "two signs", "lines": [{"text": "DOG", "polygon": BOX}, {"text": "ELK", "polygon": LOW}]},
    {"caption": "a wall", "lines": [{"polygon": LOW, "read": False}]},
)


def folders(monkeypatch, root):
    """Let the host's folders lie in one of the test, with a small folder of pictures."""
    for name in ("input", "output"):
        (root / name).mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(root / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(root / "output"))
    use_folders(monkeypatch, root, (files.CONTROLS.folder, keeping.STATES.folder))
    return write(root / "input" / dataset.FOLDER / NAME)


def write(folder, records=RECORDS, size=(64, 64)):
    """A folder of pictures and their texts."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number, record in enumerate(records):
        colours = (tiny_models.picture(height=size[1], width=size[0], seed=number)[0] * 255).byte().numpy()
        Image.fromarray(colours).save(folder / "pictures" / f"{number}.png")
        lines.append(json.dumps({"picture": f"pictures/{number}.png"} | record))
    (folder / dataset.RECORDS).write_text("\n".join(lines), encoding="utf-8")
    return folder


def teach(model, clip, **changes):
    """(control, embedder, plot, sheet, report, file)."""
    given = {"model": model, "clip": clip, "vae": SmallVAE(), "folder": NAME} | SHORT | changes
    with torch.inference_mode():
        return tiny_models.execute(TrainTextControl, **given)


__all__ = ["SmallVAE", "folders", "teach", "text_encoder", "write"]
