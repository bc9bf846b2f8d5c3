"""How a multimodal encoder is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....kernels.lora import CONSTANT, COSINE, SCHEDULES
from ...settings import Settings
from ..dataset import STAGES
from ..vlm import VisionLanguage
from .course import Course

ZEROS, LEARNED, CLIP_TEXT = "zeros", "learned", "CLIP text"
IN_LESSONS, PAPER = "in lessons", "paper"
AS_TRAINED, SNR_PLUS_1 = "as trained", "SNR + 1"


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How an encoder is trained; see PalimpsestTrainMultimodal for what each does. tokens 0: as the stage says.

    PRESETS: "paper" is table 1 of arXiv:2406.18790, from which it departs in what the paper does not say (the
    connector's width, empty prompts, warm-up); its two stages are trained one after the other, by stage. "in lessons"
    begins with what the paper's models knew: ours. CHOICES: the words that a setting may be.
    """

    PRESETS: ClassVar = {
        IN_LESSONS: {"align_steps": 2500, "read_steps": 6000, "align_rate": 3e-4, "read_rate": 1e-4,
                     "connector_rate": 1e-4, "train_unet": True, "unet_rate": 1e-4, "picture_dropout": 0.1,
                     "weighting": SNR_PLUS_1, "schedule": COSINE, "crop_weight": 6.0},
        PAPER: {"align_steps": 0, "read_steps": 0, "connector_rate": 1e-5, "train_unet": True, "unet_rate": 5e-6,
                "train_language": True, "language_rate": 3e-6, "lora_rank": 8, "depth": 16, "tokens": 0,
                "pooled_output": ZEROS, "picture_dropout": 0.0, "weighting": AS_TRAINED, "schedule": CONSTANT,
                "crop_weight": 1.0},
    }  # fmt: skip
    CHOICES: ClassVar = {
        "stage": tuple(STAGES),
        "pooled_output": (ZEROS, LEARNED, CLIP_TEXT),
        "weighting": (AS_TRAINED, SNR_PLUS_1),
        "schedule": SCHEDULES,
    }

    stage: str = next(iter(STAGES))
    steps: int = 1000
    batch_size: int = 4
    connector_rate: float = 1e-5
    train_unet: bool = False
    train_language: bool = False
    pooled_output: str = ZEROS
    seed: int = 0
    tokens: int = 0
    gradient_accumulation: int = 1
    language_rate: float = 3e-6
    unet_rate: float = 5e-6
    lora_rank: int = 8
    depth: int = 16
    prompt_dropout: float = 0.1
    warmup: int = 100
    checkpointing: bool = True
    preview_every: int = 100
    save_every: int = 500
    align_steps: int = 0
    read_steps: int = 0
    align_rate: float = 3e-4
    read_rate: float = 1e-4
    picture_dropout: float = 0.0
    keep_moments: bool = True
    weighting: str = AS_TRAINED
    schedule: str = CONSTANT
    crop_weight: float = 1.0

    @property
    def course(self) -> Course:
        """Which lesson each step is."""
        return Course(self.align_steps, self.read_steps)


def stage_tokens(vlm: VisionLanguage, settings: TrainSettings) -> int:
    """Tokens a picture. Raises ValueError for a number that the model cannot show."""
    if settings.tokens == 0 and vlm.perceiver:
        return vlm.default_tokens()
    wanted = settings.tokens or STAGES[settings.stage].tokens
    vlm.side(wanted)
    return wanted
