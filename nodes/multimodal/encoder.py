"""Multimodal encoders: a vision-language model, and the connector from it to a U-Net's cross-attention (MUMU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.connector import ConnectorConfig, ConnectorNetwork, initialise
from .. import headers, host
from ..training import LearnedNetwork
from .interleaved import Prompt
from .vlm import Hidden, VisionLanguage

POOLED_WIDTH = 1280  # of SDXL's pooled output


# ---- the connector in the host --------------------------------------------------------------------------------------


def build(config: ConnectorConfig, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> ConnectorNetwork:
    """A connector with empty weights, of layers that the host casts and moves as it does its own."""
    import comfy.ops

    return ConnectorNetwork(config, host.whole(comfy.ops.manual_cast), dtype, device)


@dataclass(frozen=True)
class Reads:
    """What a connector was trained to read: the model's mark, through the perceiver or past it, tokens a picture."""

    mark: str
    perceiver: bool
    tokens: int

    @classmethod
    def of(cls, vlm: VisionLanguage, tokens: int | None = None) -> Reads:
        """What this model shows."""
        return cls(vlm.mark, vlm.perceiver, vlm.default_tokens() if tokens is None else tokens)


@dataclass(frozen=True, eq=False)
class Connector(LearnedNetwork):
    """A connector under the host's memory management, its ConnectorConfig, what it reads, and what training wrote."""

    BUILD, INITIALISE = staticmethod(build), staticmethod(initialise)
    OFFLOAD = "text_encoder_offload_device"

    reads: Reads = field(kw_only=True)

    @classmethod
    def of(cls, network: ConnectorNetwork, reads: Reads, info: dict | None = None) -> Connector:
        """Give a network into the host's memory management; its weights must not be trained any more."""
        return super().of(network, info, reads=reads)

    @classmethod
    def new(cls, config: ConnectorConfig, reads: Reads, seed: int = 0) -> Connector:
        """An untrained connector, to be trained."""
        return super().new(config, seed, reads=reads)

    def __call__(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(context, pooled or None) of hidden states, without a gradient, in float32; see ConnectorNetwork."""
        self.load()
        device = self.patcher.load_device
        with torch.no_grad():
            states = states.to(device, torch.float32)
            return self.patcher.model(states, None if mask is None else mask.to(device))


# ---- the encoder ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MultimodalEncoder:
    """What a MULTIMODAL_ENCODER socket carries: the vision-language model and its connector, if it has one yet."""

    vlm: VisionLanguage
    connector: Connector | None = None

    def require_connector(self) -> Connector:
        """The connector. Raises ValueError where none was loaded."""
        if self.connector is None:
            raise ValueError(
                f"{self.vlm.name} has no connector to the U-Net: choose one in Load Multimodal Encoder, or train one "
                "with Train Multimodal Encoder."
            )
        return self.connector

    def hidden_states(self, prompts: Sequence[Prompt]) -> Hidden:
        """The frozen model's hidden states of prompts, with their padding mask; see VisionLanguage.hidden_states."""
        return self.vlm.hidden_states(prompts)


def join(vlm: VisionLanguage, connector: Connector | None) -> MultimodalEncoder:
    """An encoder of both. Raises ValueError for a connector that was trained on another model, or another view."""
    if connector is not None:
        reads, view = connector.reads, {True: "kept", False: "bypassed"}
        if reads.mark != vlm.mark:
            raise ValueError(
                f"the connector was trained on a model of layout {reads.mark!r}, {vlm.name} is {vlm.mark!r}: load the "
                "model that it was trained on."
            )
        if reads.perceiver != vlm.perceiver:
            raise ValueError(
                f"the connector was trained with the perceiver {view[reads.perceiver]}, it is {view[vlm.perceiver]} "
                "here: set perceiver to 'as trained'."
            )
    return MultimodalEncoder(vlm, connector)


def describe_encoder(encoder: MultimodalEncoder) -> str:
    """What an encoder is: family, size, precision, tokens a picture; what its connector was trained for."""
    vlm, connector = encoder.vlm, encoder.connector
    view = "" if not vlm.family.has_perceiver else f", perceiver {'kept' if vlm.perceiver else 'bypassed'}"
    dtype = str(vlm.dtype).removeprefix("torch.")
    first = f"{vlm.name}: {vlm.family.name}, {vlm.bytes / 1e9:.2f} GB in {dtype}, reads {vlm.limit} tokens{view}"
    if connector is None:
        return f"{first}\nno connector: for training; {vlm.default_tokens()} tokens a picture"
    return f"{first}\n{describe_connector(connector)}"


def describe_connector(connector: Connector) -> str:
    """What a connector makes, its size, and what training wrote about itself."""
    config, pooled = connector.config, "learned" if connector.config.pooled_width else "none"
    made = (
        f"connector for prompts of {config.context_width} channels, {connector.parameters / 1e6:.1f} M parameters, "
        f"{config.depth} blocks, {connector.reads.tokens} tokens a picture, pooled output {pooled}"
    )
    return "\n".join([made, "; ".join(headers.told(connector.info)) or "untrained"])


def context_width(model: Any) -> int:
    """Channels of a token in the cross-attention of a host MODEL."""
    parts = host.transformer_parts(host.require_unet(model, "Multimodal Prompt"))
    return next(part.attn2.to_k.in_features for part in parts.values() if part.attn2 is not None)
