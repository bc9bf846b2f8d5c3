"""What a training of a LoRA leaves on disk: files for every loader under one name, and states to go on from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from torch import Tensor

from ...kernels.lora import DEBIASED
from ..files import Shelf
from ..training import Changes, Factors, FileSet, lora_shelf
from ..training.fitting import Learned
from ..training.states import kept_states
from .settings import TECHNIQUE, LoRASettings

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
Parts = dict[str, Factors | Changes]  # what is trained, by part
Names = dict[str, dict[str, str]]  # by part: kohya's name of each layer, or of each vector


def content(factors: Parts, names: Names) -> dict[str, Tensor]:
    """A LoRA as kohya's programs and the host's loaders read it, in half precision."""
    found = {}
    for part, learned in factors.items():
        found |= learned.file(names[part].__getitem__)
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
        "ss_debiased_estimation": settings.loss_weight == DEBIASED,
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

    files: FileSet
    names: Names
    settings: LoRASettings
    kind: str
    written: list[str] = field(default_factory=list)

    @classmethod
    def new(cls, prefix: str, names: Names, settings: LoRASettings, kind: str) -> TrainingFiles:
        """Names that are free for all of them, in folders that were tried.

        Raises ValueError for a prefix with no letter or digit in it, OSError for what cannot be written.
        """
        every = settings.save_every or settings.epochs
        ends = ["", *(f"_ep{epoch:02}" for epoch in range(every, settings.epochs, every))]
        keeps = kept_states(settings.keep_state, ends)
        places = {f"state{end}": (STATES, end) for end in keeps} | {f"lora{end}": (LORAS, end) for end in ends}
        return cls(FileSet.new(prefix, places, {"lora", *(["state"] if keeps else [])}), names, settings, kind)

    def require_room(self, factors: Parts) -> None:
        """Raise OSError where the disks have too little room for everything that will be written."""
        numbers = sum(tensor.numel() for found in factors.values() for tensor in found.parameters())
        self.files.require_room({part: numbers * (12 if part.startswith("state") else 2) for part in self.files.places})

    def save(self, learned: Learned) -> str:
        """Write what was learned, the state first where it is wanted; the name of the LoRA, as its loaders list it."""
        end = "" if learned.final else f"_ep{learned.epoch:02}"
        contents = {}
        if f"state{end}" in self.files.places:
            contents[f"state{end}"] = learned.state(), {"settings": json.dumps(self.settings.named())}
        told = metadata(self.settings, learned, self.kind)
        self.files.write(contents | {f"lora{end}": (content(learned.factors, self.names), told)})
        self.written.append(LORAS.name(self.files.paths[f"lora{end}"]))
        return self.written[-1]


FREE = {"save_every", "preview_every", "preview_prompts", "guidance", "keep_state", "checkpointing"}
