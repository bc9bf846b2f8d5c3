"""What a training of a LoRA leaves on disk: files for every loader under one name, and states to go on from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import Shelf
from ..training import Factors, lora_shelf
from .fit import Learned
from .settings import EVERY_STATE, NO_STATE, TECHNIQUE, LoRASettings

LORAS = lora_shelf(TECHNIQUE, room="train at a lower rank")
STATES = Shelf(
    folder="palimpsest_lora_states",
    format="palimpsest.lora_state",
    version=1,
    what=("a training of a LoRA", TECHNIQUE),
    example="my style",
    put="states_of_lora_trainings",
    room="set keep_state to none",
)
NEW = "(new)"
Names = dict[str, dict[str, str]]  # by part: kohya's name of each layer


def resumable() -> list[str]:
    """States of trainings to go on from, after "(new)"."""
    return [NEW, *STATES.listed()]


def content(factors: dict[str, Factors], names: Names) -> dict[str, Tensor]:
    """A LoRA as kohya's programs and the host's loaders read it, in half precision."""
    found = {}
    for part, learned in factors.items():
        found |= learned.file(names[part].__getitem__, "lora_up", "lora_down")
    return {key: tensor if key.endswith(".alpha") else tensor.half() for key, tensor in found.items()}


def metadata(settings: LoRASettings, learned: Learned, kind: str) -> dict[str, str]:
    """What other programs show of a LoRA; kind: their name of the model's family."""
    rates = {"ss_learning_rate": settings.learning_rate, "ss_unet_lr": settings.learning_rate}
    told = rates | {
        "ss_text_encoder_lr": settings.text_rate if "text" in learned.factors else None,
        "ss_network_module": "networks.lora",
        "ss_network_dim": settings.rank,
        "ss_network_alpha": settings.alpha,
        "ss_base_model_version": kind,
        "ss_seed": settings.seed,
        "ss_steps": learned.step,
        "ss_epoch": learned.epoch,
        "ss_num_epochs": settings.epochs,
        "ss_optimizer": settings.optimiser,
        "ss_lr_scheduler": settings.schedule,
        "ss_lr_warmup_steps": settings.warm_up,
        "ss_min_snr_gamma": settings.min_snr_gamma or None,
        "ss_noise_offset": settings.noise_offset or None,
        "ss_caption_dropout_rate": settings.caption_dropout,
        "ss_gradient_accumulation_steps": settings.accumulation,
        "ss_resolution": f"({settings.resolution}, {settings.resolution})",
        "palimpsest_settings": json.dumps(settings.named()),
    }
    return {name: str(value) for name, value in told.items()}


@dataclass(frozen=True)
class TrainingFiles:
    """Where one training's files lie: <name>_00001.safetensors at its end, <name>_00001_ep02.safetensors on its way."""

    stem: Path
    names: Names
    settings: LoRASettings
    kind: str

    @classmethod
    def new(cls, prefix: str, names: Names, settings: LoRASettings, kind: str) -> TrainingFiles:
        """Names that are free. Raises ValueError for a prefix with no letter or digit in it."""
        return cls(LORAS.new_path(prefix).with_suffix(""), names, settings, kind)

    def save(self, learned: Learned) -> str:
        """Write what was learned, and its state where that is wanted; the name of the file."""
        path = self.stem.with_name(
            self.stem.name + ("" if learned.final else f"_ep{learned.epoch:02}") + ".safetensors"
        )
        if self.settings.keep_state == EVERY_STATE or (learned.final and self.settings.keep_state != NO_STATE):
            state = STATES.new_path(path.stem)
            STATES.write(state, learned.state(), {"settings": json.dumps(self.settings.named())})
        LORAS.write(path, content(learned.factors, self.names), metadata(self.settings, learned, self.kind))
        return path.name


def load_state(file: str, settings: LoRASettings) -> dict[str, Tensor]:
    """The state of a training. Raises ValueError for a damaged file, and for settings that it was not made with."""

    def from_file(header: dict[str, str], tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        if not all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
            raise ValueError("it holds NaN or infinite values.")
        if tensors["step"].shape != ():
            raise ValueError("its step is no number.")
        return dict(json.loads(header["settings"])), tensors

    before, state = STATES.read(STATES.path(file), from_file)
    free = {"save_every", "preview_every", "preview_prompts", "guidance", "keep_state", "checkpointing"}
    other = [name for name, value in settings.named().items() if name not in free and before.get(name) != value]
    if other:
        changes = ", ".join(f"{name} {before.get(name)!r} then, {getattr(settings, name)!r} now" for name in other[:3])
        raise ValueError(f"{file} goes on only with the settings it was made with ({changes}): set them as they were.")
    return state
