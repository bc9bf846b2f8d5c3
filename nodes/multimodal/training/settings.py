"""How a multimodal encoder is trained."""

from __future__ import annotations

from dataclasses import dataclass

from ...settings import Settings
from ..dataset import STAGES
from ..vlm import VisionLanguage

ZEROS, LEARNED, CLIP_TEXT = "zeros", "learned", "CLIP text"


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How an encoder is trained; see PalimpsestTrainMultimodal for what each does. tokens 0: as the stage says."""

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


def stage_tokens(vlm: VisionLanguage, settings: TrainSettings) -> int:
    """Tokens a picture. Raises ValueError for a number that the model cannot show."""
    if settings.tokens == 0 and vlm.perceiver:
        return vlm.default_tokens()
    wanted = settings.tokens or STAGES[settings.stage].tokens
    vlm.side(wanted)
    return wanted
