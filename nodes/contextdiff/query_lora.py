"""A LoRA on the queries of a U-Net's attention, trained beside a context adapter: ContextDiff's joint training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..host import gradient as tuning_runtime


class QueryLora:
    """DIFFUSION_MODEL wrapper: trained low-rank changes of every to_q, W + up down (the layers the authors train).

    The U-Net's own weights are not touched; `file` gives what the host's LoRA nodes take.
    """

    def __init__(self, network: nn.Module, rank: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in network.named_modules():
            if name.endswith(".to_q"):
                outputs, inputs = module.weight.shape
                down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
                self.pairs[name] = torch.zeros(outputs, rank, requires_grad=True), down.requires_grad_(True)

    def to(self, device: torch.device) -> QueryLora:
        """Bring the factors to a device, before an optimiser knows them."""
        for name, pair in self.pairs.items():
            self.pairs[name] = tuple(t.detach().to(device).requires_grad_(True) for t in pair)
        return self

    def parameters(self) -> list[Tensor]:
        """The factors."""
        return [tensor for pair in self.pairs.values() for tensor in pair]

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        network = executor.class_obj
        changed = {}
        for name, (up, down) in self.pairs.items():
            weight = network.get_submodule(name).weight
            changed[f"network.{name}.weight"] = tuning_runtime.ordinary(weight) + (up @ down).to(weight)
        wrapped = tuning_runtime.CallNetwork(network)
        return torch.func.functional_call(wrapped, changed, (executor, *args), kwargs)

    def file(self) -> dict[str, Tensor]:
        """The content of a LoRA file (LORA_MODEL of the host's nodes), for a strength of 1."""
        found = {}
        for name, (up, down) in self.pairs.items():
            key = "lora_unet_" + name.replace(".", "_")
            found[f"{key}.lora_up.weight"] = up.detach().cpu().clone()
            found[f"{key}.lora_down.weight"] = down.detach().cpu().clone()
            found[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
        return found
