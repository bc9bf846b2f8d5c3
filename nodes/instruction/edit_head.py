"""What an EDIT_HEAD socket carries: MGIE's head, the language model that it belongs to, and what that read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.edit_head import IMAGE_TOKENS, EditHeadConfig, EditMapper
from ..quoting import quoted

PREFIX, EMBEDDINGS = "edit_head.", "emb"  # as the published files name the head's tensors, and those of [IMG0..7]
DAMAGED = "its edit head is {}: convert the published files again, see the help page of Load MGIE."


@dataclass(frozen=True, eq=False)
class Reading:
    """A picture and the text that a language model says of it, with its states (8, D) at [IMG0..7].

    prompt: what was asked, with a place for the picture; pixels (1, 3, H, W): as its vision tower is given the picture.
    """

    prompt: str
    pixels: Tensor
    text: str
    states: Tensor


@dataclass(frozen=True, eq=False)
class EditHead:
    """MGIE's edit head; the language model whose states it reads (None: unknown); what that read, picture by picture.

    network: on the CPU in float32, None where the folder has none. embeddings (8, D): of the tokens [IMG0..7].
    """

    name: str
    network: EditMapper | None
    embeddings: Tensor | None
    model: Any = None
    readings: tuple[Reading, ...] = ()

    def reading(self, readings: tuple[Reading, ...]) -> EditHead:
        """The same head with what its language model read."""
        return replace(self, readings=readings)

    def require_network(self) -> EditMapper:
        """The head. Raises ValueError where there is none."""
        if self.network is None:
            raise ValueError(
                f"{self.name} has no edit head (no mllm.safetensors or edit_head.safetensors): take route 'expressed "
                "text', or put the file into its folder."
            )
        return self.network

    def prompts(self, states: Tensor) -> Tensor:
        """(B, 77, context): what the head makes of states (B, 8, D)."""
        with torch.no_grad():
            return self.require_network()(states.float().cpu(), self.embeddings)

    def null(self) -> Tensor:
        """(1, 77, context): the prompt of no text."""
        with torch.no_grad():
            return self.require_network().null(self.embeddings)


def head_of(tensors: Mapping[str, Tensor], heads: int, name: str) -> tuple[EditMapper, Tensor]:
    """(head, embeddings (8, D)) of a file's tensors. Raises ValueError for those that make none."""
    own = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
    own = own or {key: tensor for key, tensor in tensors.items() if key != EMBEDDINGS}
    try:
        config = EditHeadConfig.of({key: tensor.shape for key, tensor in own.items()}, heads)
        embeddings = tensors[EMBEDDINGS].float().reshape(IMAGE_TOKENS, config.hidden)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{name} is incomplete, {DAMAGED.format(f'not whole ({quoted(str(error))} is missing)')}"
        ) from error
    if config.width % heads:
        raise ValueError(f"{name} cannot be read, {DAMAGED.format(f'{config.width} wide and has {heads} heads')}")
    network = EditMapper(config, torch.nn, device="meta")
    wanted = {key: tensor.shape for key, tensor in network.state_dict().items()}
    odd = sorted(key for key in wanted.keys() | own.keys() if getattr(own.get(key), "shape", None) != wanted.get(key))
    if odd:
        raise ValueError(f"{name} cannot be read, {DAMAGED.format(f'of another layout at {quoted(odd[0])}')}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (*own.values(), embeddings)):
        raise ValueError(f"{name} cannot be read, {DAMAGED.format('not finite (NaN)')}")
    with torch.inference_mode(False):
        network.load_state_dict({key: tensor.float().clone() for key, tensor in own.items()}, assign=True)
    return network.eval().requires_grad_(False), embeddings
