"""Pictures as words: a vision-language model and a connector make CONDITIONING of interleaved prompts (MUMU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.connector import ConnectorConfig, ConnectorNetwork, initialise, repeated, weighted
from .. import host
from .context_cache import Padded, cache_context
from .interleaved import Prompt, with_tokens, words_only
from .vlm.vision_language import Hidden, Span, VisionLanguage

POOLED_WIDTH = 1280  # of SDXL's pooled output


# ---- the connector in the host --------------------------------------------------------------------------------------


def build(config: ConnectorConfig, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> ConnectorNetwork:
    """A connector with empty weights, of layers that the host casts and moves as it does its own."""
    import comfy.ops

    return ConnectorNetwork(config, comfy.ops.manual_cast, dtype, device)


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
class Connector:
    """A connector under the host's memory management, with what it reads and what training wrote about itself."""

    config: ConnectorConfig
    reads: Reads
    patcher: Any
    info: dict = field(default_factory=dict)

    @classmethod
    def of(cls, network: ConnectorNetwork, reads: Reads, info: dict | None = None) -> Connector:
        """Give a network into the host's memory management; its weights must not be trained any more."""
        import comfy.model_management
        import comfy.model_patcher

        patcher = comfy.model_patcher.CoreModelPatcher(
            network.eval().requires_grad_(False),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        return cls(network.config, reads, patcher, dict(info or {}))

    @classmethod
    def new(cls, config: ConnectorConfig, reads: Reads, seed: int = 0) -> Connector:
        """An untrained connector, to be trained."""
        network = build(config)
        initialise(network, seed)
        return cls.of(network, reads)

    def trainable(self) -> ConnectorNetwork:
        """A float32 copy of the network to train on, apart from this connector; call it where gradients are allowed."""
        network = build(self.config)
        network.load_state_dict({name: tensor.float().clone() for name, tensor in self.weights().items()})
        return network.train().requires_grad_(True)

    def weights(self) -> dict[str, Tensor]:
        """The weights on the CPU, by name."""
        return {name: tensor.detach().cpu() for name, tensor in self.patcher.model.state_dict().items()}

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for p in self.patcher.model.parameters())

    def __call__(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(context, pooled or None) of hidden states, without a gradient, in float32; see ConnectorNetwork."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.patcher])
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


# ---- prompts to CONDITIONING ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt as the U-Net reads it: context (1, L, C), learned pooled (1, P) or None, layout of its tokens."""

    context: Tensor
    pooled: Tensor | None
    layout: tuple[Span, ...]

    @property
    def tokens(self) -> int:
        """How many."""
        return self.context.shape[1]


def encode(encoder: MultimodalEncoder, prompts: Sequence[Prompt]) -> list[Encoded]:
    """Prompts through model and connector, one by one; pictures of another weight than 1 are moved from neutral."""
    connector = encoder.require_connector()
    hidden = [encoder.hidden_states([prompt]) for prompt in prompts]
    made = [connector(each.states) for each in hidden]
    encoded = [
        Encoded(c.cpu(), p if p is None else p.cpu(), h.layouts[0]) for (c, p), h in zip(made, hidden, strict=True)
    ]
    if not any(span.picture and span.picture.weight != 1.0 for each in encoded for span in each.layout):
        return encoded
    neutral = connector(encoder.hidden_states([()]).states)[0].cpu()
    return [Encoded(weigh(each, neutral), each.pooled, each.layout) for each in encoded]


def weigh(encoded: Encoded, neutral: Tensor) -> Tensor:
    """The context with every picture's tokens at their weight."""
    weight = torch.ones(encoded.tokens)
    for span in (span for span in encoded.layout if span.picture):
        weight[span.start : span.end] = span.picture.weight
    return weighted(encoded.context, neutral, weight)


def zeros(encoded: Encoded, text: str, clip: Any) -> Tensor:
    """No pooled output: the literal reading of the paper, which removes CLIP."""
    return torch.zeros(1, POOLED_WIDTH)


def clip_text(encoded: Encoded, text: str, clip: Any) -> Tensor:
    """CLIP's pooled output of the text without its pictures. Raises ValueError without a clip."""
    if clip is None:
        raise ValueError("pooled_output 'CLIP text' needs a text encoder: connect clip, or choose 'zeros'.")
    pooled = clip.encode_from_tokens(clip.tokenize(words_only(text)), return_pooled=True)[1]
    return torch.zeros(1, POOLED_WIDTH) if pooled is None else pooled.cpu()


def learned(encoded: Encoded, text: str, clip: Any) -> Tensor:
    """The connector's own pooled output. Raises ValueError where it has none."""
    if encoded.pooled is None:
        raise ValueError(
            "this connector learned no pooled output: choose 'zeros' or 'CLIP text', or train one with a pooled output."
        )
    return encoded.pooled


def automatic(encoded: Encoded, text: str, clip: Any) -> Tensor:
    """Learned where the connector has it, else CLIP's where a clip is connected, else zeros."""
    chosen = learned if encoded.pooled is not None else zeros if clip is None else clip_text
    return chosen(encoded, text, clip)


POOLED = {"auto": automatic, "zeros": zeros, "CLIP text": clip_text, "learned": learned}


def context_width(model: Any) -> int:
    """Channels of a token in the cross-attention of a host MODEL."""
    parts = host.transformer_parts(host.require_unet(model, "Multimodal Prompt"))
    return next(part.attn2.to_k.in_features for part in parts.values() if part.attn2 is not None)


def refuse_mismatch(model: Any, connector: Connector) -> None:
    """Raise ValueError where the U-Net reads tokens of another width, or another pooled output, than are made."""
    wanted, made = context_width(model), connector.config.context_width
    if wanted != made:
        known = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
        raise ValueError(
            f"the connector makes tokens of {made} channels ({known.get(made, 'another model')}), this model reads "
            f"{wanted} ({known.get(wanted, 'another model')}): load a checkpoint of the family that the connector was "
            "trained for."
        )


@dataclass(frozen=True, eq=False)
class Prompted:
    """What Multimodal Prompt gives: the model with its cache, two CONDITIONINGs of one length, what they hold."""

    model: Any
    positive: list
    negative: list
    report: str


def prompt(
    model: Any,
    encoder: MultimodalEncoder,
    texts: tuple[str, str],
    prompts: tuple[Prompt, Prompt],
    tokens: int | None = None,
    pooled_output: str = "auto",
    clip: Any = None,
) -> Prompted:
    """CONDITIONING of a positive and a negative prompt, with `tokens` a picture or as many as were trained with.

    The shorter one is repeated to the length of the longer, so that the host joins them in one batch; on the returned
    model the part of a repetition that is cut off does not count.
    """
    connector = encoder.require_connector()
    refuse_mismatch(model, connector)
    tokens = connector.reads.tokens if tokens is None else tokens
    encoded = encode(encoder, [with_tokens(each, tokens) for each in prompts])
    length = max(each.tokens for each in encoded)
    contexts = [repeated(each.context, length) for each in encoded]
    pools = [POOLED[pooled_output](each, text, clip) for each, text in zip(encoded, texts, strict=True)]
    uneven = tuple(
        Padded(context, length - length % each.tokens)
        for context, each in zip(contexts, encoded, strict=True)
        if length % each.tokens
    )
    conditioning = [[[c, {"pooled_output": p}]] for c, p in zip(contexts, pools, strict=True)]
    return Prompted(cache_context(model, uneven), *conditioning, report(encoder, encoded, length))


def report(encoder: MultimodalEncoder, encoded: Sequence[Encoded], length: int) -> str:
    """Which tokens are what, and how many of those the model can read were used."""
    positive, negative = encoded
    parts = []
    for span in positive.layout:
        if span.picture is None:
            parts.append(f"text {span.tokens}")
        else:
            weight = "" if span.picture.weight == 1.0 else f", weight {span.picture.weight:g}"
            parts.append(f"{span.picture.name} {span.tokens} ({span.side} px{weight})")
    lines = [
        f"{positive.tokens} tokens of {encoder.vlm.limit}: {' | '.join(parts)}",
        f"negative {negative.tokens} tokens, both brought to {length}",
    ]
    return "\n".join(lines)


def describe(encoder: MultimodalEncoder) -> str:
    """What an encoder is: family, size, precision, tokens a picture; what its connector was trained for."""
    vlm, connector = encoder.vlm, encoder.connector
    view = "" if not vlm.family.has_perceiver else f", perceiver {'kept' if vlm.perceiver else 'bypassed'}"
    dtype = str(vlm.dtype).removeprefix("torch.")
    lines = [
        f"{vlm.name}: {vlm.family.name}, {vlm.bytes / 1e9:.2f} GB in {dtype}, reads {vlm.limit} tokens{view}",
    ]
    if connector is None:
        return "\n".join([*lines, f"no connector: for training; {vlm.default_tokens()} tokens a picture"])
    config, pooled = connector.config, "learned" if connector.config.pooled_width else "none"
    info = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in connector.info.items()
    ]
    lines.append(
        f"connector for prompts of {config.context_width} channels, {connector.parameters / 1e6:.1f} M parameters, "
        f"{config.depth} blocks, {connector.reads.tokens} tokens a picture, pooled output {pooled}"
    )
    return "\n".join([*lines, "; ".join(info) or "untrained"])
