"""Low-rank changes that are trained beside a connector: of the U-Net, and of the vision-language model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import host
from ...host import gradient as tuning_runtime

# The layers that Idefics2's authors train in their own LoRA recipe, without the perceiver.
LANGUAGE = re.compile(
    r"(text_model|language_model|modality_projection)(?!.*perceiver)(.*\.(q|k|v|o|gate|up|down)_proj|.*\.proj)$"
    r"|^visual\.merger\.mlp\.\d+$"
)
UNET = re.compile(r"\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$")


class Factors:
    """up (outputs, rank) and down (rank, inputs) of some linear layers, by the layer's name; up starts at zero.

    layers: (name, outputs, inputs) of each. The same seed gives the same factors on every device.
    """

    def __init__(self, layers: list[tuple[str, int, int]], rank: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.rank = rank
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, outputs, inputs in layers:
            down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
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

    def file(self, layer: Callable[[str], str], up: str, down: str) -> dict[str, Tensor]:
        """The content of a LoRA file for a strength of 1; `layer` names a layer as its loader does."""
        found = {}
        for name, factors in self.pairs.items():
            for word, factor in zip((up, down), factors, strict=True):
                found[f"{layer(name)}.{word}.weight"] = factor.detach().float().cpu().clone()
            found[f"{layer(name)}.alpha"] = torch.tensor(float(self.rank))
        return found


def linear_layers(network: nn.Module, pattern: re.Pattern) -> list[tuple[str, int, int]]:
    """(name, outputs, inputs) of the linear layers whose names match."""
    return [
        (name, *module.weight.shape)
        for name, module in network.named_modules()
        if pattern.search(name) and getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]


# ---- the U-Net ------------------------------------------------------------------------------------------------------


def unet_factors(model: Any, rank: int, seed: int) -> Factors:
    """Factors for every attention projection of a host MODEL."""
    return Factors(linear_layers(host.require_unet(model, "Train Multimodal Encoder"), UNET), rank, seed)


def unet_file(factors: Factors) -> dict[str, Tensor]:
    """What the host's LoRA loaders take."""
    return factors.file(lambda name: "lora_unet_" + name.replace(".", "_"), "lora_up", "lora_down")


@dataclass(frozen=True, eq=False)
class LoraBlock:
    """The forward of one transformer block under the factors of its layers: W + up down.

    Weights are swapped block by block, so that the block can run again for its gradient (recompute.RunAgain). They are
    rounded to the U-Net's precision, as they will be when the file is loaded.
    """

    block: nn.Module
    forward: Callable
    factors: dict[str, tuple[Tensor, Tensor]]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        changed = {}
        for name, (up, down) in self.factors.items():
            weight = tuning_runtime.ordinary(self.block.get_submodule(name).weight)
            changed[f"network.{name}.weight"] = weight + (up @ down).to(weight)
        wrapped = tuning_runtime.CallNetwork(self.block)
        return torch.func.functional_call(wrapped, changed, (self.forward, *args), kwargs)


def add_to_unet(patched: Any, factors: Factors) -> None:
    """Let the factors act in every transformer block of a cloned MODEL; the host undoes it on unload."""
    blocks = {id(part) for part in host.transformer_parts(patched.model.diffusion_model).values()}
    for name, module in patched.model.diffusion_model.named_modules():
        start = f"{name}."
        inner = {key.removeprefix(start): pair for key, pair in factors.pairs.items() if key.startswith(start)}
        if id(module) in blocks and inner:
            key = f"diffusion_model.{name}.forward"
            patched.add_object_patch(key, LoraBlock(module, patched.get_model_object(key), inner))


# ---- the vision-language model --------------------------------------------------------------------------------------


def language_factors(model: nn.Module, rank: int, seed: int) -> Factors:
    """Factors for the language model and the layers between it and its eye; the eye is not trained."""
    return Factors(linear_layers(model, LANGUAGE), rank, seed)


def language_file(factors: Factors) -> dict[str, Tensor]:
    """What Load Multimodal Encoder takes, and PEFT's own names behind their first part."""
    return factors.file(lambda name: name, "lora_B", "lora_A")


@contextmanager
def acting(model: nn.Module, factors: Factors | None) -> Iterator[None]:
    """Within, the layers of a vision-language model add up(down(x)) to what they give."""

    def added(pair: tuple[Tensor, Tensor]) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            up, down = pair
            return output + (inputs[0].to(down) @ down.T @ up.T).to(output)

        return hook

    handles = []
    try:
        for name, pair in (factors.pairs if factors else {}).items():
            handles.append(model.get_submodule(name).register_forward_hook(added(pair)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def run_again(text: nn.Module, wanted: bool) -> Iterator[None]:
    """Within, transformers' own gradient checkpointing runs in a language model, and no dropout."""
    if not wanted:
        yield
        return
    now = "activation" if hasattr(text, "activation_checkpointing_enable") else "gradient"
    before = {module: (module.training, set(module._forward_hooks)) for module in text.modules()}
    try:
        getattr(text, f"{now}_checkpointing_enable")({"use_reentrant": False})
        for module in text.modules():
            module.training = hasattr(module, "gradient_checkpointing") or module.training
        yield
    finally:
        getattr(text, f"{now}_checkpointing_disable")()
        for module, (training, hooks) in before.items():
            module.training = training
            for hook in module._forward_hooks.keys() - hooks:  # transformers leaves one on the token table
                del module._forward_hooks[hook]
