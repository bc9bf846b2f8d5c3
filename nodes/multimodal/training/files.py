"""What a training of a multimodal encoder leaves on disk: a connector, LoRAs that stock loaders take, and its state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...files import Shelf
from ...headers import Header, Tensors
from ...quoting import quoted
from ...training import Content, FileSet, lora_shelf
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
WORDS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a tensor


def trainings() -> list[str]:
    """Trainings to go on with, after "(new)"."""
    return [NEW, *STATES.listed()]


def load_state(path: str) -> dict[str, Tensor]:
    """The state of a training. Raises ValueError for a foreign, newer, cut-off or damaged file."""
    return STATES.read(path, from_file)


def from_file(header: Header, tensors: Tensors) -> dict[str, Tensor]:
    """A training's state from a file's header and tensors; raises ValueError where it is nonsense."""
    header.info(steps=int)
    tensors.require("steps", kinds=("I64", "I32"))
    if "anew" in tensors:
        tensors.require("anew", kinds=("I64", "I32"))
    if "lessons" in tensors:
        tensors.require("lessons", 2, kinds=("I64", "I32"))
    for name in tensors:
        of, _, word = name.partition("|")
        if word and (of not in tensors or word not in WORDS):
            raise ValueError(f"its tensor {quoted(name)} belongs to nothing in it")
        if word:
            tensors.require(name, *(() if word == "step" else tensors.shapes[of]), kinds=("F32", "F16", "BF16"))
    found = dict(tensors)
    if int(found["steps"]) < 0:
        raise ValueError(f"it has taken {int(found['steps'])} steps")
    if not 0 <= int(found.get("anew", 0)) <= int(found["steps"]):
        raise ValueError(f"its optimisers began at step {int(found['anew'])} of {int(found['steps'])}")
    if "lessons" in found and int(found["lessons"].min()) < 0:
        raise ValueError(f"its lessons have {found['lessons'].tolist()} steps")
    if not all(torch.isfinite(tensor).all() for tensor in found.values() if tensor.is_floating_point()):
        raise ValueError("it holds NaN or infinite values")
    return found


@dataclass(frozen=True)
class TrainingFiles:
    """Where one training's files lie: the same name and number for all of them."""

    files: FileSet

    @classmethod
    def new(cls, prefix: str, keep_state: bool, *, unet: bool = False, language: bool = False) -> TrainingFiles:
        """Names that are free, in folders that were tried; unet, language: whether there will be LoRAs of them.

        Raises ValueError for a prefix with no letter or digit in it, OSError for what cannot be written.
        """
        places = {"state": (STATES, "")} if keep_state else {}
        places |= {
            "connector": (multimodal_files.SHELF, ""),
            "unet": (LORAS, "_unet"),
            "language": (LORAS, "_language"),
        }
        idle = {part for part, learns in (("unet", unet), ("language", language)) if not learns}
        return cls(FileSet.new(prefix, places, places.keys() - idle))

    @property
    def connector(self) -> Path:
        """Where the connector lies, or will."""
        return self.files.paths["connector"]

    def require_room(self, sizes: dict[str, int], *, again: bool = True) -> None:
        """Raise OSError where the disk has too little room for parts of these bytes; those not kept do not count.

        again: they will be written more than once.
        """
        kept = {part: size for part, size in sizes.items() if part in self.files.places}
        self.files.require_room(kept, again=again)

    def save(self, snapshot: Snapshot) -> list[str]:
        """Write, or write anew, everything that was learned: the state first, from which all else can be made again.

        Returns what was written, as people find it. Raises OSError that names what was kept where some was not.
        """
        contents: dict[str, Content] = {}
        if "state" in self.files.places:
            contents["state"] = snapshot.state, {"info": json.dumps(snapshot.info)}
        contents["connector"] = multimodal_files.content(snapshot.connector)
        loras = {"unet": snapshot.unet_lora, "language": snapshot.language_lora}
        contents |= {part: (tensors, {}) for part, tensors in loras.items() if tensors}
        return self.files.write(contents)
