"""Whole weights that are trained: what is added to each, so that the model's own stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..host import gradient


class Changes:
    """A change of each of some weights, by the weight's name; all start at zero, in float32.

    Weight decay draws them to zero, which is the weights as they were.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.tensors = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}

    def to(self, device: Any) -> None:
        """Bring the changes to a device, before an optimiser knows them."""
        self.tensors = {name: t.detach().to(device).requires_grad_(True) for name, t in self.tensors.items()}

    def named(self) -> dict[str, Tensor]:
        """The changes by name."""
        return dict(self.tensors)

    def parameters(self) -> list[Tensor]:
        """The changes, for an optimiser."""
        return list(self.tensors.values())

    def learned(self) -> dict[str, Tensor]:
        """What was learned, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class ChangedWeight:
    """Weight wrapper of the host: a layer runs on its weight and the change, with a gradient into this.

    The sum is taken in the change's precision and rounded once, as the host does when it merges a patch.
    """

    changes: Changes
    name: str

    def __call__(self, weight: Tensor) -> Tensor:
        return (gradient.ordinary(weight).to(torch.float32) + self.changes.tensors[self.name]).to(weight.dtype)


def changes_act_in(patched: Any, prefix: str, changes: Changes) -> None:
    """Let changes act in a cloned patcher whose model has their weights below `prefix`; undone on unload."""
    for name in changes.tensors:
        patched.add_weight_wrapper(f"{prefix}{name}", ChangedWeight(changes, name))
