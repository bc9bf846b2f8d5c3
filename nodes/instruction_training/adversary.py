"""The adversarial term of a training: Feature Blend's patch discriminator, which is kept and gone on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import feature_blend
from ..training.optimisers import restore, state_of
from .examples import Example

PREFIX = "opponent."
MEASURED = 64  # examples by whose spread latents are measured


class Adversary(feature_blend.Opponent):
    """Tells the model's edited pictures from the true ones of the same triples, on latents."""

    def __init__(self, examples: Sequence[Example], seed: int, device: Any):
        numbers = torch.cat([example.latent.flatten() for example in examples[:MEASURED]])
        channels = examples[0].latent.shape[1]
        super().__init__(numbers[: len(numbers) // channels * channels].reshape(1, channels, -1, 1).to(device), seed)

    def snapshot(self) -> dict[str, Tensor]:
        """What going on takes."""
        found = {f"{PREFIX}network.{name}": t.detach().cpu().clone() for name, t in self.network.state_dict().items()}
        return found | {f"{PREFIX}steps.{name}": value for name, value in state_of(self.optimiser).items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from an earlier training's state, where it has one."""
        kept = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
        if not kept:
            return
        with torch.no_grad():
            for name, tensor in self.network.named_parameters():
                tensor.copy_(kept[f"network.{name}"])
        restore(self.optimiser, {k.removeprefix("steps."): v for k, v in kept.items() if k.startswith("steps.")})
