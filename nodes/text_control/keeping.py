"""What a training of a text control leaves on disk: controls under one name, and states to go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.lora import CONSTANT
from .. import exact_text
from ..files import Shelf
from ..training import FileSet
from ..training.fitting import Learned
from ..training.states import kept_states
from . import names
from .control import Layout
from .files import CONTROLS, Parts
from .settings import TECHNIQUE, TrainSettings

STATES = Shelf(
    folder="palimpsest_text_control_states",
    format="palimpsest.text_control_state",
    version=1,
    what=("a training of a text control", TECHNIQUE),
    example="my signs",
    put="states_of_text_control_trainings",
    room="set keep_state to none",
)
FREE = {"save_every", "preview_every", "guidance", "keep_state", "checkpointing"}


def free_settings(settings: TrainSettings) -> set[str]:
    """What may be another when a training goes on: its length as well, where no rate depends on it."""
    return FREE | ({"steps"} if settings.schedule == CONSTANT else set())


def content(control: Mapping[str, Tensor], projection: Mapping[str, Tensor], recogniser: Any) -> dict[str, Tensor]:
    """A text control by AnyText's names in half precision; a recogniser that is not the pack's own goes with it."""
    known = names.PROJECTIONS[0 if "norm_weight" in projection else 1]
    found = {names.published_name(name): tensor for name, tensor in control.items()}
    found |= {known[name]: tensor for name, tensor in projection.items()}
    if recogniser is not exact_text.shipped_recogniser():
        weights = recogniser.state_dict().items()
        found |= {names.OWN_READER + name: t for name, t in weights if not name.endswith("num_batches_tracked")}
    return {name: tensor.detach().to("cpu", torch.float16).clone() for name, tensor in found.items()}


def header_of(layout: Layout, info: dict[str, Any]) -> dict[str, str]:
    """The header of one of our files."""
    return {"layout": json.dumps(asdict(layout)), "info": json.dumps(info)}


def parts_of(learned: Mapping[str, Any], layout: Layout) -> Parts:
    """What the file of something learned has, as Load AnyText reads it."""
    control = {name: t.detach().to("cpu", torch.float16) for name, t in learned["control"].named().items()}
    projection = {name: t.detach().cpu().half().float() for name, t in learned["embeddings"].named().items()}
    return Parts(layout, control, projection, {}, {})


@dataclass(frozen=True)
class TrainingFiles:
    """Where one training's files lie: <name>_00001.safetensors at its end, <name>_00001_1000.safetensors on its way."""

    files: FileSet
    settings: TrainSettings
    layout: Layout
    recogniser: Any
    written: list[str] = field(default_factory=list)

    @classmethod
    def new(cls, prefix: str, settings: TrainSettings, layout: Layout, recogniser: Any) -> TrainingFiles:
        """Names that are free for all of them, in folders that were tried.

        Raises ValueError for a prefix with no letter or digit in it, OSError for what cannot be written.
        """
        every = settings.save_every or settings.steps
        ends = ["", *(f"_{step}" for step in range(every, settings.steps, every))]
        keeps = kept_states(settings.keep_state, ends)
        places = {f"state{end}": (STATES, end) for end in keeps} | {f"control{end}": (CONTROLS, end) for end in ends}
        needed = {"control", *(["state"] if keeps else [])}
        return cls(FileSet.new(prefix, places, needed), settings, layout, recogniser)

    def require_room(self, tensors: int) -> None:
        """Raise OSError where the disks have too little room for all that will be written, of so many numbers."""
        self.files.require_room({part: tensors * (12 if part.startswith("state") else 2) for part in self.files.places})

    def save(self, learned: Learned) -> str:
        """Write what was learned, the state first where it is wanted; the control's name, as Load AnyText lists it."""
        end = "" if learned.final else f"_{learned.step}"
        contents = {}
        if f"state{end}" in self.files.places:
            contents[f"state{end}"] = learned.state(), {"settings": json.dumps(self.settings.named())}
        control, embeddings = learned.factors["control"], learned.factors["embeddings"]
        info = {"steps": learned.step, "settings": self.settings.named()}
        made = content(control.named(), embeddings.named(), self.recogniser)
        self.files.write(contents | {f"control{end}": (made, header_of(self.layout, info))})
        self.written.append(CONTROLS.name(self.files.paths[f"control{end}"]))
        return self.written[-1]
