"""How a text control is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...kernels.lora import CONSTANT
from .. import exact_text
from ..settings import Settings
from ..training.optimisers import ADAMW
from ..training.states import LAST_STATE

TECHNIQUE = "Train Text Control"


@dataclass(frozen=True)
class TrainSettings(Settings):
    """See PalimpsestTrainTextControl for what each does. The learning rate and the shares are AnyText's."""

    repeats: ClassVar[int] = 1
    cycles: ClassVar[int] = 1

    steps: int = 10000
    batch_size: int = 2
    accumulation: int = 3
    learning_rate: float = 2e-5
    resolution: int = 512
    blank_share: float = 0.5
    reading_weight: float = 0.0
    font: str = exact_text.BUILT_IN
    seed: int = 0
    save_every: int = 1000
    preview_every: int = 1000
    guidance: float = 9.0
    checkpointing: bool = True
    optimiser: str = ADAMW
    schedule: str = CONSTANT
    warm_up: int = 0
    weight_decay: float = 0.01
    keep_state: str = LAST_STATE
