"""AdamW for what is trained: torch's, or with states of 8 bits by a library that is installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

ADAMW, ADAMW_8BIT = "AdamW", "AdamW 8-bit"
OPTIMISERS = (ADAMW, ADAMW_8BIT)
Groups = list[dict[str, Any]]


class Learning(Protocol):
    """What is trained of one part of a model: low-rank factors, or changes of whole weights."""

    def to(self, device: Any) -> None:
        """Bring the tensors to a device, before an optimiser knows them."""

    def named(self) -> dict[str, Tensor]:
        """The tensors by name."""

    def parameters(self) -> Iterable[Tensor]:
        """The tensors, for an optimiser."""


class OptimiserSettings(Protocol):
    """What of a node's settings says how AdamW is made."""

    optimiser: str
    weight_decay: float


@dataclass(frozen=True)
class Optimiser:
    """An optimiser and what it is, in words."""

    steps: torch.optim.Optimizer
    name: str


def by_bitsandbytes(groups: Groups, decay: float) -> Optimiser:
    """AdamW8bit of bitsandbytes (arXiv:2110.02861). Raises ImportError."""
    import bitsandbytes

    optimiser = bitsandbytes.optim.AdamW8bit(groups, weight_decay=decay)
    smallest = 4096  # elements: its own limit, below which a state keeps 32 bits
    tensors = [tensor for group in groups for tensor in group["params"]]
    small = sum(tensor.numel() < smallest for tensor in tensors)
    note = f", {small} of {len(tensors)} tensors too small for 8 bits" if small else ""
    return Optimiser(optimiser, f"AdamW8bit of bitsandbytes {bitsandbytes.__version__}{note}")


def optimiser_for(groups: Groups, settings: OptimiserSettings) -> Optimiser:
    """The optimiser that was chosen; where no library has its 8-bit form, AdamW, which its name then says."""
    if settings.optimiser == ADAMW_8BIT:
        try:
            return by_bitsandbytes(groups, settings.weight_decay)
        except ImportError:
            note = " (for 8 bits install bitsandbytes)"
    else:
        note = ""
    return Optimiser(torch.optim.AdamW(groups, weight_decay=settings.weight_decay), f"AdamW{note}")


def groups_of(parts: Mapping[str, Learning], rates: Mapping[str, float]) -> Groups:
    """A group of parameters for each part of the model, with its own learning rate; `start` keeps that rate."""
    return [{"params": found.parameters(), "lr": rates[part], "start": rates[part]} for part, found in parts.items()]


def state_of(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that an optimiser remembers of each tensor, by the tensor's place and the value's name."""
    tensors = [tensor for group in optimiser.param_groups for tensor in group["params"]]
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().clone()
        for number, tensor in enumerate(tensors)
        for name, value in optimiser.state.get(tensor, {}).items()
    }


def restore(optimiser: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Let an optimiser remember what `state_of` gave; whole numbers were plain numbers. Raises ValueError."""
    tensors = [tensor for group in optimiser.param_groups for tensor in group["params"]]
    for key, value in state.items():
        number, name = key.split(".", 1)
        if int(number) >= len(tensors):
            raise ValueError("it was made with other layers.")
        tensor = tensors[int(number)]
        plain = value.ndim == 0 and not value.is_floating_point()
        kept = value.item() if plain else value.clone().to("cpu" if value.ndim == 0 else tensor.device)
        optimiser.state[tensor][name] = kept
