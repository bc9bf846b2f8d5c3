"""Gradient checkpointing (arXiv:1604.06174): less memory for a gradient, for blocks run once more on its way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .gradient import CallNetwork

OPTIONS = "transformer_options"


@dataclass(frozen=True)
class CheckpointedBlock:
    """The forward of one block of the host's U-Net, which keeps its input alone; patches of other nodes survive it.

    The options are copied each time, for the host writes the running block's name into them: patches that look at it
    would be told the last block's. The weights are those of the first time, for others may stand in the module only
    while the network runs (AliasWeights).
    """

    block: nn.Module
    forward: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        weights = {f"network.{name}": tensor for name, tensor in self.block.named_parameters()}
        kept = kwargs | ({OPTIONS: kwargs[OPTIONS].copy()} if OPTIONS in kwargs else {})

        def run(*inputs: Any) -> Tensor:
            given = kept | ({OPTIONS: kept[OPTIONS].copy()} if OPTIONS in kept else {})
            return torch.func.functional_call(CallNetwork(self.block), weights, (self.forward, *inputs), given)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The residual and transformer blocks of a U-Net, by name."""
    from comfy.ldm.modules.attention import BasicTransformerBlock
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (BasicTransformerBlock, ResBlock))
    }


def install(patched: Any) -> None:
    """Let every block of a MODEL be checkpointed; the host undoes it when it loads another clone."""
    for name, block in blocks(patched.model.diffusion_model).items():
        key = f"diffusion_model.{name}.forward"
        patched.add_object_patch(key, CheckpointedBlock(block, patched.get_model_object(key)))


def checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of a module of our own, which keeps its inputs alone."""

    def run(*args: Any) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return run
