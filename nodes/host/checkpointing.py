"""Gradient checkpointing (arXiv:1604.06174): less memory for a gradient, for blocks run once more on its way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .gradient import CallNetwork

OPTIONS = "transformer_options"


@dataclass(frozen=True)
class CheckpointedBlock:
    """The forward of one block of the host's network, which keeps its input alone; patches of other nodes survive it.

    The options are copied each time, for the host writes the running block's name into them: patches that look at it
    would be told the last block's. The weights are those of the first time, for others may stand in the module only
    while the network runs (AliasWeights). told: what the block is given by name in any case. writes_over: it writes
    into what it is given, of which it gets copies.
    """

    block: nn.Module
    forward: Callable
    told: Mapping[str, Any] = field(default_factory=dict)
    writes_over: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        kwargs |= self.told
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        weights = {f"network.{name}": tensor for name, tensor in self.block.named_parameters()}
        kept = kwargs | ({OPTIONS: kwargs[OPTIONS].copy()} if OPTIONS in kwargs else {})

        def run(*inputs: Any) -> Tensor:
            given = kept | ({OPTIONS: kept[OPTIONS].copy()} if OPTIONS in kept else {})
            if self.writes_over:
                inputs = [copied(value) for value in inputs]
                given |= {name: copied(value) for name, value in given.items()}
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
    """Let every block of a U-Net's MODEL be checkpointed; the host undoes it when it loads another clone."""
    install_on(patched, blocks(patched.model.diffusion_model))


def install_on(
    patched: Any, names: Iterable[str], told: Mapping[str, Any] | None = None, writes_over: bool = False
) -> None:
    """Let some blocks of a MODEL be checkpointed, by their names in its network; the rest as CheckpointedBlock has it.

    Norms keep their input for the gradient, so that they get copies, too, where a block writes into it behind them.
    """
    for name in names:
        block, key = patched.model.diffusion_model.get_submodule(name), f"diffusion_model.{name}.forward"
        forward = patched.get_model_object(key)
        patched.add_object_patch(key, CheckpointedBlock(block, forward, told or {}, writes_over))
        norms = [inner for inner, module in block.named_modules() if isinstance(module, nn.LayerNorm)]
        for inner in norms if writes_over else ():
            key = f"diffusion_model.{name}.{inner}.forward"
            patched.add_object_patch(key, OfACopy(patched.get_model_object(key)))


@dataclass(frozen=True)
class OfACopy:
    """The forward of a norm, of a copy of its input where a gradient is wanted."""

    forward: Callable

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(copied(x) if torch.is_grad_enabled() else x, *args, **kwargs)


def copied(value: Any) -> Any:
    """A tensor's copy; any other value itself."""
    return value.clone() if isinstance(value, Tensor) else value


def checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of a module of our own, which keeps its inputs alone."""

    def run(*args: Any) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return run
