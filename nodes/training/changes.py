"""Whole weights that are trained: what is added to each, so that the model's own stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..host import gradient


class NamedTensors:
    """Tensors that are trained, by name, in float32."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = {name: t.detach().float().cpu().clone().requires_grad_(True) for name, t in tensors.items()}

    def to(self, device: Any) -> None:
        """Move the tensors; to be done before an optimiser is made of them."""
        self.tensors = {name: t.detach().to(device).requires_grad_(True) for name, t in self.tensors.items()}

    def named(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(self.tensors)

    def parameters(self) -> list[Tensor]:
        """The tensors, for an optimiser."""
        return list(self.tensors.values())

    def learned(self) -> dict[str, Tensor]:
        """What was learned, on the CPU."""
        return self.file(str)

    def file(self, key: Callable[[str], str]) -> dict[str, Tensor]:
        """The same by the names that `key` gives them, as Factors have a file."""
        return {key(name): tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}


class Changes(NamedTensors):
    """A change of each of some weights, biases and norms among them, by the weight's name; all start at zero.

    Weight decay draws them to zero, which is the weights as they were.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__({name: torch.zeros(shape) for name, shape in shapes.items()})

    @classmethod
    def of(cls, network: nn.Module, names: Iterable[str]) -> Changes:
        """Of the named weights of a network."""
        return cls({name: tuple(network.get_parameter(name).shape) for name in names})


@dataclass(frozen=True, eq=False)
class ChangedWeight:
    """Weight wrapper of the host: a layer runs on its weight and the change, with a gradient into this.

    The sum is taken in the change's precision and rounded once, as the host does when it merges a patch.
    """

    changes: Changes
    name: str

    def __call__(self, weight: Tensor) -> Tensor:
        return (gradient.ordinary(weight).to(torch.float32) + self.changes.tensors[self.name]).to(weight.dtype)


def changes_act_in_unet(patched: Any, changes: Changes) -> None:
    """Let changes act in a cloned MODEL; the host undoes it on unload."""
    for name in changes.tensors:
        patched.add_weight_wrapper(f"diffusion_model.{name}", ChangedWeight(changes, name))
