"""The course of a training, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class History:
    """What a training was like.

    losses: the mean of each step. points: (step, place in the schedule, loss) of every picture. before: steps of the
    trainings that this one goes on from. kept: steps that the weights have taken. stopped: why it ended early, if so.
    """

    losses: list[float] = field(default_factory=list)
    points: list[tuple[int, float, float]] = field(default_factory=list)
    before: int = 0
    kept: int = 0
    stopped: str = ""

    @property
    def steps(self) -> int:
        """Steps in all, with those before."""
        return self.before + self.kept

    @property
    def finite(self) -> bool:
        """Whether any loss was a number."""
        return any(map(math.isfinite, self.losses))

    def note(self, step: int, places: Iterable[float], losses: Tensor) -> float:
        """Write down a step: the losses (B,) of its pictures, and the place of each in the schedule. Their mean."""
        loss = float(losses.mean())
        self.kept += 1
        self.losses.append(loss)
        self.points += [(step, place, each) for place, each in zip(places, losses.tolist(), strict=True)]
        return loss

    @property
    def tenth(self) -> int:
        """A tenth of the steps, one at least."""
        return max(1, len(self.losses) // 10)

    def early(self) -> float:
        """Mean loss of the first tenth of the steps."""
        return finite_mean(self.losses[: self.tenth])

    def recent(self) -> float:
        """Mean loss of the last tenth of the steps."""
        return finite_mean(self.losses[-self.tenth :])

    def counted(self) -> str:
        """How many steps, for a report."""
        return f"{self.kept} steps" + (f" after {self.before}" if self.before else "")

    def fallen(self) -> str:
        """From where to where the loss went, for a report."""
        return f"loss {self.early():.4f} -> {self.recent():.4f}"


def finite_mean(losses: list[float]) -> float:
    """The mean of those that are numbers; 0 without any."""
    found = [loss for loss in losses if math.isfinite(loss)]
    return sum(found) / max(1, len(found))
