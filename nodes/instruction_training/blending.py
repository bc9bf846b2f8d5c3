"""Feature Blend's weights learned beside an instruction model: one alpha a feature, towards the edited picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import feature_blend, host

NAME = "palimpsest_instruction_blend"
RATE = 0.01  # of alpha's a: a tenth of Tune Feature Blend's, for twenty times its steps and more


class Alphas(Mapping):
    """alpha = sigmoid(a) of every feature, a = 0 at first, which is the paper's 0.5; one for the whole picture."""

    def __init__(self, layers: list[feature_blend.FeatureLayer]):
        self.layers = layers
        self.raw = {layer.key: torch.zeros(1, requires_grad=True) for layer in layers}

    def __getitem__(self, key: feature_blend.Feature) -> tuple[Tensor, Tensor]:
        return (torch.sigmoid(self.raw[key])[0],) * 2  # inside of a mask and outside

    def __iter__(self) -> Iterator[feature_blend.Feature]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def to(self, device: Any) -> None:
        """Bring the alphas to a device, before an optimiser knows them."""
        self.raw = {key: value.detach().to(device).requires_grad_(True) for key, value in self.raw.items()}

    def named(self) -> dict[str, Tensor]:
        """Every a by its feature's name."""
        return {str(layer): self.raw[layer.key] for layer in self.layers}

    def parameters(self) -> list[Tensor]:
        """Every a, for an optimiser."""
        return list(self.raw.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {float(torch.sigmoid(value.detach())):.2f}" for name, value in self.named().items())

    def weights(self, model: Any) -> feature_blend.BlendWeights:
        """What Feature Blend reads."""
        learned = {name: float(torch.sigmoid(value.detach())) for name, value in self.named().items()}
        return feature_blend.BlendWeights(learned, host.layout_fingerprint(model), {"source": "re-noised"})


@dataclass(frozen=True, eq=False)
class BlendedPass:
    """A call of the model in which the source's features flow back, from a pass of the source at the same noise level.

    The source is noised with the result's own noise, as Feature Blend does with source_latents re-noised.
    """

    alphas: Alphas
    sources: Mapping[feature_blend.Feature, feature_blend.Feature]

    @classmethod
    def of(cls, alphas: Alphas) -> BlendedPass:
        """With what each feature is blended: itself."""
        return cls(alphas, feature_blend.sources_of(alphas.layers, False))

    def patch(self, patched: Any) -> None:
        """Let the passes meet features of a clone."""
        feature_blend.patch_features(patched, NAME, {*self.alphas, *self.sources.values()})

    def record(self, call: Callable[[dict], Any], arguments: dict) -> feature_blend.Blending:
        """Run call(arguments) on the source, without a gradient: what blends its features in."""
        recording = feature_blend.Recording(frozenset(self.sources.values()))
        with torch.no_grad():
            call(with_step(arguments, recording))
        return feature_blend.Blending(recording.pieces(), self.sources, self.alphas)


def with_step(arguments: dict, step: Any) -> dict:
    """The arguments of a model call in which features meet a step."""
    options = arguments.get("model_options", {})
    inner = options.get("transformer_options", {}) | {NAME: step}
    return arguments | {"model_options": options | {"transformer_options": inner}}
