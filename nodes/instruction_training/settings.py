"""How an instruction model is trained: the node's settings, and the recipe of InstructPix2Pix as a preset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...kernels.lora import CONSTANT, COSINE
from ..settings import Settings
from ..training.optimisers import ADAMW
from ..training.states import LAST_STATE

TECHNIQUE = "Train Instruction"
LORA, WHOLE, HEAD_ALONE = "LoRA", "whole U-Net", "edit head alone"
METHODS = (LORA, WHOLE, HEAD_ALONE)
INSTRUCT = "InstructPix2Pix"


@dataclass(frozen=True)
class InstructionSettings(Settings):
    """See PalimpsestTrainInstruction for what each does."""

    PRESETS: ClassVar = {
        INSTRUCT: {
            "method": WHOLE, "steps": 10000, "resolution": 256, "batch_size": 16, "accumulation": 64,
            "learning_rate": 1e-4, "schedule": CONSTANT, "warm_up": 0, "drop_text": 0.05, "drop_both": 0.05,
            "drop_picture": 0.05, "min_snr_gamma": 0.0, "reconstruction": 0.0,
        }
    }  # fmt: skip

    method: str = LORA
    steps: int = 3000
    batch_size: int = 1
    resolution: int = 0
    rank: int = 32
    alpha: float = 32.0
    learning_rate: float = 1e-4
    optimiser: str = ADAMW
    schedule: str = COSINE
    seed: int = 0
    save_every: int = 500
    preview_every: int = 500
    checkpointing: bool = True
    text_guidance: float = 7.5
    picture_guidance: float = 1.5
    drop_text: float = 0.05
    drop_both: float = 0.05
    drop_picture: float = 0.05
    min_snr_gamma: float = 0.0
    reconstruction: float = 0.0
    words_inside: bool = False
    held_out: int = 0
    accumulation: int = 4
    convolutions: bool = True
    cycles: int = 1
    warm_up: int = 0
    weight_decay: float = 0.01
    keep_widened: bool = True
    keep_state: str = LAST_STATE
    blend_layers: str = ""
    head_rate: float = 5e-4
    text_steps: int = 0
    image_tokens: bool = True
    head_width: int = 512
    head_layers: int = 4
    adversarial: float = 0.0

    @property
    def repeats(self) -> int:
        """How often a round over all triples shows each."""
        return 1
