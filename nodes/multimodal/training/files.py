"""What a training of a multimodal encoder leaves on disk: a connector, LoRAs that stock loaders take, and its state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...files import Shelf
from ...training import lora_shelf
from .. import files as multimodal_files
from .learner import Snapshot

STATES = Shelf(
    folder="palimpsest_trainings",
    format="palimpsest.multimodal_training",
    version=1,
    what=("a training of a multimodal encoder", "Train Multimodal Encoder"),
    example="mumu sdxl",
    put="trainings",
    room="train without keep_state",
)
LORAS = lora_shelf("Train Multimodal Encoder", room="train without LoRAs")
NEW = "(new)"


def trainings() -> list[str]:
    """Trainings to go on with, after "(new)"."""
    return [NEW, *STATES.listed()]


def load_state(path: str) -> dict[str, Tensor]:
    """The state of a training. Raises ValueError for a foreign, newer, cut-off or damaged file."""

    def from_file(header: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        json.loads(header["info"])
        if "steps" not in tensors or not all(
            torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()
        ):
            raise ValueError("it has no steps, or NaN in it.")
        return tensors

    return STATES.read(path, from_file)


@dataclass(frozen=True)
class TrainingFiles:
    """Where one training's files lie: the same name for all of them; state None: not kept."""

    connector: Path
    state: Path | None

    @classmethod
    def new(cls, prefix: str, keep_state: bool) -> TrainingFiles:
        """Names that are free. Raises ValueError for a prefix with no letter or digit in it."""
        connector = multimodal_files.SHELF.new_path(prefix)
        return cls(connector, STATES.new_path(prefix).with_name(connector.name) if keep_state else None)

    def save(self, snapshot: Snapshot) -> list[str]:
        """Write, or write anew, everything that was learned; returns what was written, as people find it."""
        multimodal_files.save_connector(snapshot.connector, self.connector)
        written = [f"models/{multimodal_files.SHELF.folder}/{self.connector.name}"]
        for part, tensors in (("unet", snapshot.unet_lora), ("language", snapshot.language_lora)):
            if tensors:
                folder = LORAS.new_path(self.connector.stem).parent
                name = f"{self.connector.stem}_{part}.safetensors"
                LORAS.write(folder / name, tensors, {})
                written.append(f"models/{LORAS.folder}/{name}")
        if self.state is not None:
            STATES.write(self.state, snapshot.state, {"info": json.dumps(snapshot.info)})
            written.append(f"models/{STATES.folder}/{self.state.name}")
        return written
