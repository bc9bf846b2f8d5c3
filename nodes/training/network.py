"""A learned network's life in the host: built empty, begun from a seed, managed, copied to be trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

Learned = TypeVar("Learned", bound="LearnedNetwork")


@dataclass(frozen=True, eq=False)
class LearnedNetwork:
    """A network under the host's memory management, with its sizes and what training wrote about itself.

    A technique's own class names the functions that make it: BUILD(config, dtype, device) with empty weights, and
    INITIALISE(network, seed). OFFLOAD: the host's function that says where it rests. info: plain JSON values.
    """

    BUILD: ClassVar[Callable[..., nn.Module]]
    INITIALISE: ClassVar[Callable[[nn.Module, int], None]]
    OFFLOAD: ClassVar[str] = "unet_offload_device"

    config: Any
    patcher: Any
    info: dict = field(default_factory=dict)

    @classmethod
    def of(cls: type[Learned], network: nn.Module, info: dict | None = None, **more: Any) -> Learned:
        """Give a network into the host's memory management; its weights must not be trained any more."""
        import comfy.model_management
        import comfy.model_patcher

        patcher = comfy.model_patcher.CoreModelPatcher(
            network.eval().requires_grad_(False),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=getattr(comfy.model_management, cls.OFFLOAD)(),
        )
        return cls(network.config, patcher, dict(info or {}), **more)

    @classmethod
    def new(cls: type[Learned], config: Any, seed: int = 0, **more: Any) -> Learned:
        """An untrained one, to be trained."""
        network = cls.BUILD(config)
        cls.INITIALISE(network, seed)
        return cls.of(network, **more)

    def trainable(self) -> nn.Module:
        """A float32 copy of the network to train on, apart from this one; call it where gradients are allowed."""
        network = type(self).BUILD(self.config)
        network.load_state_dict({name: tensor.float().clone() for name, tensor in self.weights().items()})
        return network.train().requires_grad_(True)

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The weights on the CPU, by name; in another precision where one is named."""
        return {name: tensor.detach().to("cpu", dtype) for name, tensor in self.patcher.model.state_dict().items()}

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for p in self.patcher.model.parameters())

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(p.numel() * p.element_size() for p in self.patcher.model.parameters())

    def load(self) -> None:
        """Bring the weights to the device, as the host does with any model.

        It asks for no more than their own few megabytes: activations are smaller than the room the host keeps for those
        of the model that is sampling, which must not be moved out in the middle of a run.
        """
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.patcher])
