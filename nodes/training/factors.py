"""Low-rank changes that are trained beside a network (LoRA, arXiv:2106.09685): W + up down."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.lora import low_rank_sum
from ..host import gradient
from .seeds import generator

Pair = tuple[Tensor, Tensor]


def weighted_layers(network: nn.Module, names: Iterable[str]) -> list[tuple[str, ...]]:
    """(name, *shape of its weight) of some layers of a network."""
    return [(name, *network.get_submodule(name).weight.shape) for name in names]


def linear_layers(network: nn.Module, pattern: re.Pattern) -> list[tuple[str, int, int]]:
    """(name, outputs, inputs) of the linear layers whose names match."""
    return [
        (name, *module.weight.shape)
        for name, module in network.named_modules()
        if pattern.search(name) and getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]


class Factors:
    """up (outputs, rank) and down (rank, inputs) of some layers, by the layer's name; up starts at zero.

    layers: (name, outputs, inputs, *kernel) of each; alpha: the change is alpha / rank up down, None: up down. The same
    seed gives the same factors on every device.
    """

    def __init__(self, layers: list[tuple[str, ...]], rank: int, seed: int, alpha: float | None = None):
        drawn = generator(seed)
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.pairs: dict[str, Pair] = {}
        self.kernels: dict[str, tuple[int, ...]] = {}
        for name, outputs, inputs, *kernel in layers:
            columns = inputs * math.prod(kernel)
            down = torch.randn(rank, columns, generator=drawn) / columns**0.5
            self.pairs[name] = torch.zeros(outputs, rank, requires_grad=True), down.requires_grad_(True)
            self.kernels[name] = tuple(kernel)

    @property
    def scale(self) -> float:
        """What up down is multiplied with."""
        return self.alpha / self.rank

    def to(self, device: Any) -> None:
        """Bring the factors to a device, before an optimiser knows them."""
        for name, pair in self.pairs.items():
            self.pairs[name] = tuple(t.detach().to(device).requires_grad_(True) for t in pair)

    def named(self) -> dict[str, Tensor]:
        """The factors by name."""
        found = {}
        for name, (up, down) in self.pairs.items():
            found |= {f"{name}.up": up, f"{name}.down": down}
        return found

    def parameters(self) -> list[Tensor]:
        """The factors, for an optimiser."""
        return list(self.named().values())

    def file(self, layer: Callable[[str], str], up: str = "lora_up", down: str = "lora_down") -> dict[str, Tensor]:
        """The content of a LoRA file for a strength of 1; `layer` names a layer as its loader does."""
        found = {}
        for name, factors in self.pairs.items():
            kernel = self.kernels.get(name, ())
            ends = [1] * len(kernel), kernel  # a convolution's factors are convolutions
            for word, factor, end in zip((up, down), factors, ends, strict=True):
                rows, columns = len(factor), factor.shape[1] // math.prod(end)
                whole = factor.detach().float().cpu().reshape(rows, columns, *end)
                found[f"{layer(name)}.{word}.weight"] = whole.clone()
            found[f"{layer(name)}.alpha"] = torch.tensor(self.alpha)
        return found


# ---- in models of the host ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LowRankWeight:
    """Weight wrapper of the host: a layer runs on its weight and the factors, with a gradient into these.

    Nothing is kept but the factors: gradient checkpointing forms the sum once more.
    """

    factors: Factors
    layer: str

    def __call__(self, weight: Tensor) -> Tensor:
        return low_rank_sum(gradient.ordinary(weight), *self.factors.pairs[self.layer], self.factors.scale)


def act_in(patched: Any, prefix: str, factors: Factors) -> None:
    """Let factors act in a cloned patcher whose model has their layers below `prefix`; the host undoes it on unload."""
    for layer in factors.pairs:
        patched.add_weight_wrapper(f"{prefix}{layer}.weight", LowRankWeight(factors, layer))


def act_in_unet(patched: Any, factors: Factors) -> None:
    """Let factors act in a cloned MODEL."""
    act_in(patched, "diffusion_model.", factors)


def unet_file(factors: Factors) -> dict[str, Tensor]:
    """What the host's LoRA loaders take."""
    return factors.file(lambda name: "lora_unet_" + name.replace(".", "_"))


# ---- in any other network -------------------------------------------------------------------------------------------


@contextmanager
def added_by(factors: Factors | None, network: nn.Module) -> Iterator[None]:
    """Within, the layers of a network add up(down(x)) to what they give; without factors, nothing."""

    def added(pair: Pair) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            up, down = pair
            return output + (inputs[0].to(down) @ down.T @ up.T).to(output)

        return hook

    handles = []
    try:
        for name, pair in (factors.pairs if factors else {}).items():
            handles.append(network.get_submodule(name).register_forward_hook(added(pair)))
        yield
    finally:
        for handle in handles:
            handle.remove()
