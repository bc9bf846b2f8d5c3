"""How a LoRA is trained: the node's settings, and the recipe of the review paper as a preset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...kernels.lora import CONSTANT, COSINE, EVEN, PICTURE
from ..settings import Settings
from ..training.optimisers import ADAMW, ADAMW_8BIT
from ..training.states import LAST_STATE

TECHNIQUE = "Train LoRA"
PAPER, STYLE = "paper", "style"


@dataclass(frozen=True)
class LoRASettings(Settings):
    """See PalimpsestTrainLoRA for what each does."""

    PRESETS: ClassVar = {
        PAPER: {
            "epochs": 20, "repeats": 5, "batch_size": 1, "accumulation": 1, "learning_rate": 1e-4, "text_rate": 1e-5,
            "schedule": COSINE, "cycles": 1, "warm_up": 0, "optimiser": ADAMW_8BIT, "save_every": 2, "flip": False,
            "min_snr_gamma": 0.0, "noise_offset": 0.0, "caption_dropout": 0.0, "convolutions": False,
            "loss_weight": EVEN, "biases": False,
        },
        STYLE: {"convolutions": True, "biases": True, "loss_weight": PICTURE, "schedule": CONSTANT},
    }  # fmt: skip

    epochs: int = 10
    repeats: int = 10
    batch_size: int = 1
    resolution: int = 0
    rank: int = 16
    alpha: float = 8.0
    learning_rate: float = 1e-4
    text_rate: float = 1e-5
    optimiser: str = ADAMW
    schedule: str = COSINE
    seed: int = 0
    save_every: int = 2
    preview_every: int = 2
    checkpointing: bool = True
    trigger: str = ""
    preview_prompts: str = ""
    guidance: float = 7.5
    flip: bool = False
    cycles: int = 1
    warm_up: int = 0
    weight_decay: float = 0.01
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    accumulation: int = 1
    convolutions: bool = False
    prior_weight: float = 1.0
    keep_state: str = LAST_STATE
    class_count: int = 0
    loss_weight: str = EVEN
    biases: bool = False
