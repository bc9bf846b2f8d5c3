"""Learned blending weights: what travels from Tune Feature Blend to Feature Blend and into a file."""

from __future__ import annotations

from dataclasses import dataclass, field

from .layers import FeatureLayer


@dataclass(frozen=True)
class BlendWeights:
    """One alpha in 0..1 for every blended feature: the edit's share of it, everywhere in the picture.

    alphas: by the feature's name ("input 8", "middle", "output 5", "out"). layout: fingerprint of the architecture.
    """

    alphas: dict[str, float]
    layout: str
    info: dict = field(default_factory=dict)

    def require_sound(self) -> None:
        """Raise ValueError for weights that are no shares."""
        for name, alpha in self.alphas.items():
            if not 0 <= alpha <= 1:
                raise ValueError(f"the blend weight of {name} is {alpha:g}, it goes from 0 to 1: tune again.")

    def on(self, layers: list[FeatureLayer]) -> list[FeatureLayer]:
        """Those of a model's features that have a weight. Raises ValueError if the model lacks one."""
        found = [layer for layer in layers if str(layer) in self.alphas]
        if len(found) != len(self.alphas):
            missing = sorted(self.alphas.keys() - {str(layer) for layer in found})
            raise ValueError(
                f"these blend weights are for features that this model does not have ({', '.join(missing)}): load the "
                "checkpoint family they were tuned on (SD 1.5 or SDXL), or tune again."
            )
        return found

    def __str__(self) -> str:
        return ", ".join(f"{name} {alpha:.2f}" for name, alpha in self.alphas.items())

    @property
    def learning(self) -> str:
        """How they were learned, in a few words."""
        losses = self.info.get("losses", [])
        tenth = max(1, len(losses) // 10)
        if not losses:
            return "no record of the tuning"
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        return f"loss {first:.3f} at first, {last:.3f} at last over {len(losses)} steps"
