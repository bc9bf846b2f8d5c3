"""What of a text control learns: the network beside the U-Net, and the projection that makes tokens of lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.controlnet
import torch
from torch import Tensor, nn

from ...kernels.exact_text import token_embedding
from .. import training
from ..host import checkpointing, widening
from .control import Layout, TextControl, build
from .files import NECK


class ControlWeights:
    """A float32 network of a layout that learns. The host's own weights are copied, never changed."""

    def __init__(self, network: nn.Module):
        self.network = network.requires_grad_(True)

    @classmethod
    def begin(cls, model: Any, control: TextControl | None, seed: int) -> ControlWeights:
        """As a control has it; without one as the first half of the MODEL's U-Net, with nothing to say yet."""
        layout = Layout.of(model)
        if control is not None and control.control_model.layout != layout:
            raise ValueError(
                "control_net was made for a U-Net of another size than the model's: connect the model that it was "
                "trained with, or none, to begin a new one."
            )
        given = unet_weights(model) if control is None else control.control_model.state_dict()
        weights = {name: weight.detach().float().cpu().clone() for name, weight in given.items()}
        network = build(layout, torch.float32, "cpu")
        if control is None:
            weights |= first_weights(network, seed)
        network.load_state_dict({name: weights[name] for name in network.state_dict()})
        return cls(network)

    def to(self, device: Any) -> None:
        """Bring it to a device, before an optimiser knows it."""
        self.network.to(device)

    def named(self) -> dict[str, Tensor]:
        """The weights by the host's names."""
        return dict(self.network.named_parameters())

    def parameters(self) -> list[Tensor]:
        """The weights, for an optimiser."""
        return list(self.named().values())

    def keep_inputs_alone(self) -> None:
        """Let its blocks run again for the gradient, with less memory."""
        for block in checkpointing.blocks(self.network).values():
            block.forward = checkpointing.CheckpointedBlock(block, block.forward)


def unet_weights(model: Any) -> dict[str, Tensor]:
    """A MODEL's U-Net as its file has it: what is loaded may bear another branch's LoRA."""
    weights = widening.original_weights(model)
    return {name.removeprefix("diffusion_model."): weight for name, weight in weights.items()}


def first_weights(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """What a new control has and the U-Net has not: zero convolutions, and a hint block that ends in zero."""
    drawn, found = training.generator_at(seed, "hint block"), {}
    for name, weight in network.state_dict().items():
        if name.startswith(("zero_convs.", "middle_block_out.", "input_hint_block.fuse_block.")):
            found[name] = torch.zeros_like(weight)
        elif name.startswith("input_hint_block."):
            fan = (
                weight[0].numel() if weight.ndim > 1 else 1
            )  # torch's own for a convolution: U(-b, b), b = 1/sqrt(fan)
            spread = fan**-0.5 if weight.ndim > 1 else 0.0
            found[name] = (2 * torch.rand(weight.shape, generator=drawn) - 1) * spread
    return found


class Projection(training.NamedTensors):
    """LayerNorm(Linear(neck)), or the linear map alone where that is what it begins from."""

    @classmethod
    def new(cls, width: int) -> Projection:
        """All zero behind a LayerNorm, as the authors begin."""
        zero = torch.zeros(width)
        return cls(
            {"weight": torch.zeros(width, NECK), "bias": zero, "norm_weight": torch.ones(width), "norm_bias": zero}
        )

    def __call__(self, necks: Tensor) -> Tensor:
        """Embeddings (L, D) of lines (L, 40, 64), with a gradient."""
        return token_embedding(necks.to(self.tensors["weight"]), **self.tensors)


class LearningControl(comfy.controlnet.ControlBase):
    """A ControlNet with a gradient into its network. hint: of the pictures that the model is asked about."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.hint, self.sampling = network, None, None

    def pre_run(self, model: Any, percent_to_timestep_function: Callable) -> None:
        """Before the run that the training is."""
        super().pre_run(model, percent_to_timestep_function)
        self.sampling = model.model_sampling

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict, *_: Any) -> dict[str, list]:
        """What is added to the U-Net: as the host's own ControlNet asks its network, in float32."""
        said = self.network(
            x=self.sampling.calculate_input(t, x_noisy).float(),
            hint=self.hint.to(x_noisy.device),
            timesteps=self.sampling.timestep(t).float(),
            context=cond["c_crossattn"].float(),
        )
        return self.control_merge(said, None, None)

    def copy(self) -> LearningControl:
        """Itself: the host asks for none, and two would not share their hint."""
        return self

    def cleanup(self) -> None:
        """After the run."""
        self.sampling = None
        super().cleanup()


def cloned(h: Tensor, options: dict) -> Tensor:
    """Input block patch behind the skip: the next block reads a copy, for the host adds the control to the skip."""
    return h.clone() if torch.is_grad_enabled() else h
