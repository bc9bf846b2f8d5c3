"""[IMG0] to [IMG7] of a language model, learned beside it: what it is given for them, and how it says them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.edit_head import IMAGE_TOKENS
from ...kernels.instruction_head import with_rows

GIVEN, SAID = "image_tokens.given", "image_tokens.said"  # as files name them


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Rows (8, D) in the place of those of a token table, and of those of a language head; float32.

    They act where the model is asked, so that many may share one model, whose weights stay as they are.
    """

    given: Tensor
    said: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], hidden: int, name: str) -> ImageRows | None:
        """Those of a file's tensors, None where it has none. Raises ValueError for damaged ones."""
        found = [tensors.get(key) for key in (GIVEN, SAID)]
        if found == [None, None]:
            return None
        for key, tensor in zip((GIVEN, SAID), found, strict=True):
            shape = None if tensor is None else tuple(tensor.shape)
            if shape != (IMAGE_TOKENS, hidden) or not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{name} cannot be read: its {key} is {'missing' if shape is None else shape or 'damaged'}, and "
                    f"({IMAGE_TOKENS}, {hidden}) finite numbers are needed: train it again."
                )
        return cls(*(tensor.float() for tensor in found))

    def tensors(self) -> dict[str, Tensor]:
        """By their names in files."""
        return {GIVEN: self.given, SAID: self.said}

    def embed(self, embedded: Tensor, tokens: Tensor, images: list[int]) -> Tensor:
        """Tokens (1, L) as a model is given them (1, L, D), the image tokens by these rows."""
        for row, image in zip(self.given.to(embedded), images, strict=True):
            embedded = torch.where((tokens == image)[..., None], row, embedded)
        return embedded

    def speak(self, logits: Tensor, states: Tensor, images: list[int]) -> Tensor:
        """Logits (..., V) of states (..., D), those of the image tokens by these rows."""
        return with_rows(logits, states, self.said, images)
