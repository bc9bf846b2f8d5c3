"""Captions that a vision-language model writes of pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import host, multimodal
from .helping import CaptionSettings


def describer(
    encoder: Any, settings: CaptionSettings, tell: Callable[[str], None] = lambda text: None
) -> Callable[[Tensor], str]:
    """What describes a picture (1, H, W, 3) by a multimodal encoder's model; its language head is read once.

    Raises ValueError, when the first picture is to be described, where the model's folder has no language head.
    """
    head: list = []

    def describe(picture: Tensor) -> str:
        host.stop_if_cancelled()
        if not head:
            head.append(multimodal.language_head(encoder.vlm))

        def heard(text: str, tokens: int) -> None:
            host.stop_if_cancelled()
            tell(text)

        said = multimodal.answer(
            encoder.vlm, head[0], picture[0], settings.question, most=settings.max_tokens, heard=heard
        )
        return " ".join(said.text.split())

    return describe
