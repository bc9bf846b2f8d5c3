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
    return Optimiser(optimiser, f"AdamW8bit of bitsandbytes {bitsandbytes.__version__}{in_full(groups)}")


def by_torchao(groups: Groups, decay: float) -> Optimiser:
    """AdamW8bit of torchao (the same paper). Raises ImportError.

    Its step is written for torch.compile, which needs a compiler and, for each size of a tensor, seconds in which a
    training cannot be cancelled: here it runs as it stands. Learning rates, which it wants as tensors, may be numbers.
    """
    import torchao
    from torch.compiler import set_stance

    try:
        from torchao.optim import AdamW8bit
    except ImportError:  # its place in older versions
        from torchao.prototype.low_bit_optim import AdamW8bit

    class Uncompiled(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            with set_stance("force_eager"):
                return super().step(closure)

    optimiser = Uncompiled(groups, weight_decay=decay)
    note = in_full(groups, optimiser.block_size)
    return Optimiser(optimiser, f"AdamW8bit of torchao {torchao.__version__}{note}")


def in_full(groups: Groups, block: int = 1) -> str:
    """How many tensors keep states of 32 bits, in words: both libraries' limit, and what blocks do not divide."""
    smallest = 4096  # elements
    tensors = [tensor for group in groups for tensor in group["params"]]
    left = sum(tensor.numel() < smallest or tensor.numel() % block > 0 for tensor in tensors)
    few = "too small for 8 bits" if block == 1 else f"too small for 8 bits or no multiple of {block}"
    return f", {left} of {len(tensors)} tensors {few}" if left else ""


def optimiser_for(groups: Groups, settings: OptimiserSettings) -> Optimiser:
    """The optimiser that was chosen; where no library has its 8-bit form, AdamW, which its name then says."""
    note = ""
    if settings.optimiser == ADAMW_8BIT:
        for library in (by_bitsandbytes, by_torchao):
            try:
                return library(groups, settings.weight_decay)
            except ImportError:
                note = " (for 8 bits install bitsandbytes or torchao)"
    return Optimiser(torch.optim.AdamW(groups, weight_decay=settings.weight_decay), f"AdamW{note}")


def groups_of(parts: Mapping[str, Learning], rates: Mapping[str, float]) -> Groups:
    """A group of parameters for each part of the model, with its own learning rate; `start` keeps that rate."""
    return [{"params": found.parameters(), "lr": rates[part], "start": rates[part]} for part, found in parts.items()]


# ---- what an optimiser remembers -------------------------------------------------------------------------------------


def values_of(memory: Mapping[str, Any]) -> dict[str, Any]:
    """What is remembered of one tensor, by name. What torchao has in 8 bits is in parts: codes, scales and a table."""
    found = {}
    for name, value in memory.items():
        if hasattr(value, "__tensor_flatten__"):
            found |= {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        else:
            found[name] = value
    return found


def state_of(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that an optimiser remembers of each tensor, by the tensor's place and the value's name."""
    tensors = [tensor for group in optimiser.param_groups for tensor in group["params"]]
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().clone()
        for number, tensor in enumerate(tensors)
        for name, value in values_of(optimiser.state.get(tensor, {})).items()
    }


def begin(optimiser: torch.optim.Optimizer) -> None:
    """A first step without gradient at rates of 0: tensors stay, and the optimiser has what it remembers of each."""
    rates = [group["lr"] for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["lr"] = 0.0
        for tensor in group["params"]:
            tensor.grad = torch.zeros_like(tensor)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate


@torch.no_grad()
def restore(optimiser: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Let a new optimiser remember what `state_of` gave. Raises ValueError where another kind of optimiser gave it."""
    begin(optimiser)
    tensors = [tensor for group in optimiser.param_groups for tensor in group["params"]]
    given: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        number, name = key.split(".", 1)
        given.setdefault(int(number), {})[name] = value
    if given and max(given) >= len(tensors):
        raise ValueError("it was made with other layers.")
    for number, tensor in enumerate(tensors):
        if number in given:
            remember(optimiser.state[tensor], given[number])
        else:
            optimiser.state.pop(tensor, None)


def remember(memory: dict[str, Any], given: Mapping[str, Tensor]) -> None:
    """Put values in the place of what an optimiser remembers of one tensor. Raises ValueError where they do not fit."""
    kept = values_of(memory)
    sizes, wanted = ({n: torch.as_tensor(v).shape for n, v in found.items()} for found in (given, kept))
    if sizes != wanted:
        raise ValueError(
            f"its AdamW remembers {', '.join(sorted(given))} of a tensor, here it is {', '.join(sorted(kept))}: it was "
            "made with another library for 8 bits, or without. Install the one that its report names."
        )
    for name, value in kept.items():
        if isinstance(value, Tensor):
            value.copy_(given[name])
        else:
            memory[name] = given[name].item()
