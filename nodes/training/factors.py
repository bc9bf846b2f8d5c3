"""Low-rank changes that are trained beside a network (LoRA, arXiv:2106.09685): W + up down."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..host import gradient
from .seeds import generator

Pair = tuple[Tensor, Tensor]


def linear_layers(network: nn.Module, pattern: re.Pattern) -> list[tuple[str, int, int]]:
    """(name, outputs, inputs) of the linear layers whose names match."""
    return [
        (name, *module.weight.shape)
        for name, module in network.named_modules()
        if pattern.search(name) and getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]


class Factors:
    """up (outputs, rank) and down (rank, inputs) of some linear layers, by the layer's name; up starts at zero.

    layers: (name, outputs, inputs) of each. The same seed gives the same factors on every device.
    """

    def __init__(self, layers: list[tuple[str, int, int]], rank: int, seed: int):
        drawn = generator(seed)
        self.rank = rank
        self.pairs: dict[str, Pair] = {}
        for name, outputs, inputs in layers:
            down = torch.randn(rank, inputs, generator=drawn) / inputs**0.5
            self.pairs[name] = torch.zeros(outputs, rank, requires_grad=True), down.requires_grad_(True)

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

    def file(self, layer: Callable[[str], str], up: str, down: str) -> dict[str, Tensor]:
        """The content of a LoRA file for a strength of 1; `layer` names a layer as its loader does."""
        found = {}
        for name, factors in self.pairs.items():
            for word, factor in zip((up, down), factors, strict=True):
                found[f"{layer(name)}.{word}.weight"] = factor.detach().float().cpu().clone()
            found[f"{layer(name)}.alpha"] = torch.tensor(float(self.rank))
        return found


# ---- in a U-Net of the host -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FactoredBlock:
    """The forward of one transformer block under the factors of its layers, each by its name in the block.

    Weights are swapped block by block, so that gradient checkpointing can run the block once more. They are rounded to
    the U-Net's precision, as they will be when the file is loaded.
    """

    block: nn.Module
    forward: Callable
    factors: Factors
    layers: dict[str, str]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        changed = {}
        for name, layer in self.layers.items():
            up, down = self.factors.pairs[layer]
            weight = gradient.ordinary(self.block.get_submodule(name).weight)
            changed[f"network.{name}.weight"] = weight + (up @ down).to(weight)
        wrapped = gradient.CallNetwork(self.block)
        return torch.func.functional_call(wrapped, changed, (self.forward, *args), kwargs)


def act_in_unet(patched: Any, factors: Factors) -> None:
    """Let factors act in every transformer block of a cloned MODEL; the host undoes it on unload."""
    blocks = {id(part) for part in host.transformer_parts(patched.model.diffusion_model).values()}
    for name, module in patched.model.diffusion_model.named_modules():
        start, key = f"{name}.", f"diffusion_model.{name}.forward"
        layers = {layer.removeprefix(start): layer for layer in factors.pairs if layer.startswith(start)}
        if id(module) in blocks and layers:
            patched.add_object_patch(key, FactoredBlock(module, patched.get_model_object(key), factors, layers))


def unet_file(factors: Factors) -> dict[str, Tensor]:
    """What the host's LoRA loaders take."""
    return factors.file(lambda name: "lora_unet_" + name.replace(".", "_"), "lora_up", "lora_down")


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
