"""What a training leaves on disk, under one name: LoRAs or U-Nets for the host's loaders, and states to go on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import feature_blend, instruction
from ..files import Shelf
from ..training import FileSet, lora_shelf
from ..training.fitting import Learned
from ..training.states import kept_states
from .learning import Parts
from .settings import TECHNIQUE, WHOLE, InstructionSettings

LORAS = lora_shelf(TECHNIQUE, room="train at a lower rank")
UNETS = Shelf(
    folder="diffusion_models",
    format="pt",
    version=1,
    what=("a U-Net", TECHNIQUE),
    example="my edits",
    room="set method to LoRA, or keep_widened off",
)
STATES = Shelf(
    folder="palimpsest_instruction_states",
    format="palimpsest.instruction_state",
    version=1,
    what=("a training to follow instructions", TECHNIQUE),
    example="my edits",
    put="states_of_instruction_trainings",
    room="set keep_state to none",
)
FREE = {
    "save_every", "preview_every", "text_guidance", "picture_guidance", "keep_state", "keep_widened", "checkpointing",
}  # fmt: skip


def metadata(settings: InstructionSettings, learned: Learned, kind: str) -> dict[str, str]:
    """What other programs show of a LoRA; kind: their name of the model's family."""
    told = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": settings.rank,
        "ss_network_alpha": settings.alpha,
        "ss_base_model_version": kind,
        "ss_learning_rate": settings.learning_rate,
        "ss_unet_lr": settings.learning_rate,
        "ss_seed": settings.seed,
        "ss_steps": learned.step,
        "ss_optimizer": settings.optimiser,
        "ss_lr_scheduler": settings.schedule,
        "ss_lr_warmup_steps": settings.warm_up,
        "ss_min_snr_gamma": settings.min_snr_gamma or None,
        "ss_gradient_accumulation_steps": settings.accumulation,
        "ss_resolution": f"({settings.resolution}, {settings.resolution})",
        "palimpsest_settings": json.dumps(settings.named()),
    }
    return {name: str(value) for name, value in told.items()}


@dataclass
class TrainingFiles:
    """Where one training's files lie: <name>_00001 at its end, <name>_00001_s00500 on its way, _base beside a LoRA.

    base: makes the U-Net that a LoRA belongs to, where that is to be kept.
    """

    files: FileSet
    settings: InstructionSettings
    parts: Parts
    model: Any
    kind: str
    whole: Callable[[], dict[str, Tensor]]
    base: Callable[[], dict[str, Tensor]] | None = None
    written: list[str] = field(default_factory=list)

    @classmethod
    def new(cls, prefix: str, settings: InstructionSettings, parts: Parts, **more: Any) -> TrainingFiles:
        """Names that are free for all of them, in folders that were tried. more: model, kind, whole and base.

        Raises ValueError for a prefix with no letter or digit in it, OSError for what cannot be written.
        """
        every = settings.save_every or settings.steps
        ends = ["", *(f"_s{step:05}" for step in range(every, settings.steps, every))]
        places = {f"state{end}": (STATES, end) for end in kept_states(settings.keep_state, ends)}
        shelf = UNETS if settings.method == WHOLE else LORAS
        if parts.has_unet:
            places |= {f"model{end}": (shelf, end) for end in ends}
        if parts.head is not None:
            places |= {f"head{end}": (instruction.HEADS, end) for end in ends}
        places |= {f"blend{end}": (feature_blend.SHELF, end) for end in ends if parts.blend is not None}
        if more.get("base") is not None:
            places["base"] = UNETS, "_base"
        needed = {part for part in ("model", "head", "state", "base", "blend") if part in places}
        return cls(FileSet.new(prefix, places, needed), settings, parts, **more)

    def require_room(self, unet: int) -> None:
        """Raise OSError where the disks have too little room for everything that will be written; unet: its bytes."""
        numbers, head = self.parts.numbers, self.parts.head
        sizes = {
            "blend": 1 << 16,
            "state": 12 * numbers,
            "head": 0 if head is None else 2 * sum(tensor.numel() for tensor in head.parameters()),
            "base": unet,
            "model": 2 * numbers if self.parts.is_lora else unet,
        }
        self.files.require_room({part: sizes[part.partition("_")[0]] for part in self.files.places})

    def save_base(self) -> None:
        """Write the U-Net that a LoRA belongs to, where it is wanted: before there is anything that a cancel keeps."""
        if self.base is not None:
            self.files.write({"base": (self.base(), {})})

    def save(self, learned: Learned) -> str:
        """Write what was learned, the state first where it is wanted; the name that its loader lists."""
        end = "" if learned.final else f"_s{learned.step:05}"
        contents = {}
        if f"state{end}" in self.files.places:
            contents[f"state{end}"] = learned.state(), {"settings": json.dumps(self.settings.named())}
        told = metadata(self.settings, learned, self.kind)
        if self.parts.blend is not None:
            contents[f"blend{end}"] = feature_blend.content(self.parts.blend.weights(self.model))
        if self.parts.head is not None:
            contents[f"head{end}"] = self.parts.head.content()
        if self.parts.has_unet:
            contents[f"model{end}"] = (self.parts.lora() if self.parts.is_lora else self.whole()), told
        self.files.write(contents)
        shelf, _ = self.files.places[f"{self.main}{end}"]
        self.written.append(shelf.name(self.files.paths[f"{self.main}{end}"]))
        return self.written[-1]

    @property
    def main(self) -> str:
        """The part whose names people are told."""
        return "model" if self.parts.has_unet else "head"

    @property
    def base_name(self) -> str:
        """The name of the U-Net that a LoRA belongs to, as its loader lists it; empty where none was written."""
        return UNETS.name(self.files.paths["base"]) if "base" in self.files.own else ""

    @property
    def head_name(self) -> str:
        """The name of the edit head of the end, as Load MGIE lists it; empty where none was written."""
        return instruction.HEADS.name(self.files.paths["head"]) if "head" in self.files.own else ""
