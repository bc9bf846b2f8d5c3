"""What is trained on: pictures in buckets of like size, with their captions and masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...kernels.scripts import split_lines
from ..training.pictures import bucket_of, covering
from .settings import LoRASettings


@dataclass(frozen=True, eq=False)
class Example:
    """One picture: its latent (1, C, H, W) in the model's scale and its weight in the loss, (1, 1, H, W) or None.

    mirrored: the latent of the picture seen in a mirror, where that is learned too. prior: it stands for its class, not
    for what is learned.
    """

    latent: Tensor
    caption: str
    where: Tensor | None = None
    mirrored: Tensor | None = None
    prior: bool = False

    @property
    def bucket(self) -> tuple[int, int]:
        """Pictures of one bucket can share a batch."""
        return tuple(self.latent.shape[2:])


def captions_for(count: int, captions: Sequence[str], trigger: str) -> list[str]:
    """A caption for each of `count` pictures, behind the trigger word.

    Takes a caption for each; one text of as many lines; or one line for all. Raises ValueError for any other number.
    """
    texts = list(captions)
    if len(texts) == 1 and count > 1:
        texts = split_lines(texts[0]) or texts
    if len(texts) == 1:
        texts = texts * count
    if len(texts) != count:
        raise ValueError(
            f"there are {len(texts)} captions for {count} pictures: give one for each in their order, one text with a "
            "line for each, or one line for all."
        )
    plain = (" ".join(text.split()).strip() for text in texts)
    return [", ".join(filter(None, (trigger.strip(), text))) for text in plain]


def masks_for(count: int, masks: Sequence[Tensor]) -> list[Tensor | None]:
    """A mask (1, 1, H, W) for each of `count` pictures, or None for each. Raises ValueError for any other number."""
    if not masks:
        return [None] * count
    found = [mask[None] for batch in masks for mask in batch.reshape(-1, *batch.shape[-2:]).split(1)]
    found = found * count if len(found) == 1 else found
    if len(found) != count:
        raise ValueError(f"there are {len(found)} masks for {count} pictures: give one for each, or one for all.")
    empty = next((number for number, mask in enumerate(found, 1) if not (mask > 0).any()), None)
    if empty is not None:
        raise ValueError(f"mask {empty} is empty, so that nothing of its picture would be learned: paint the subject.")
    return found


def examples(
    model: Any,
    vae: Any,
    pictures: Sequence[Tensor],
    captions: Sequence[str],
    masks: Sequence[Tensor | None],
    *,
    settings: LoRASettings,
    prior: bool = False,
) -> Iterator[Example]:
    """Each picture, encoded at the size of its bucket; mirrored as well where the settings say so."""

    def encoded(pixels: Tensor) -> Tensor:
        return model.model.process_latent_in(vae.encode(pixels)).float().cpu().clone()

    for picture, caption, mask in zip(pictures, captions, masks, strict=True):
        width, height = bucket_of(picture.shape[2], picture.shape[1], settings.resolution)
        pixels = covering(picture.movedim(-1, 1).float(), width, height).movedim(1, -1)
        latent = encoded(pixels)
        where = None
        if mask is not None:
            whole = covering(mask.to("cpu", latent.dtype), width, height)
            where = F.adaptive_avg_pool2d(whole, latent.shape[2:])
        mirrored = encoded(pixels.flip(2)) if settings.flip and not prior else None
        yield Example(latent, caption, where, mirrored, prior)
