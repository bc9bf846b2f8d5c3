"""Prompts of words and pictures as the host's CONDITIONING, and the model that reads them (MUMU)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.connector import repeated, weighted
from ..settings import Settings
from .context_cache import Padded, cache_context
from .encoder import POOLED_WIDTH, Connector, MultimodalEncoder, context_width
from .interleaved import Prompt, fill, numbered, with_tokens, words_only
from .seen import layout_picture
from .vlm import Span

AS_TRAINED = "as trained"
TOKENS = [AS_TRAINED, "16", "64", "144", "256", "324", "576", "1024", "1296"]
BACKGROUND = {"removed": True, "kept": False}
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


@dataclass(frozen=True)
class PromptSettings(Settings):
    """What is prompted, and how pictures are shown; see PalimpsestMultimodalPrompt for each."""

    text: str
    negative_text: str = ""
    tokens_per_picture: str = AS_TRAINED
    background: str = "removed"
    pooled_output: str = "auto"

    @property
    def texts(self) -> dict[str, str]:
        """Both texts, by the id of their input."""
        return {"text": self.text, "negative_text": self.negative_text}

    def tokens(self, trained: int) -> int:
        """Tokens a picture, where the connector was trained with so many."""
        return trained if self.tokens_per_picture == AS_TRAINED else int(self.tokens_per_picture)


# ---- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt as the U-Net reads it: context (1, L, C), learned pooled (1, P) or None, layout of its tokens."""

    context: Tensor
    pooled: Tensor | None
    layout: tuple[Span, ...]

    @property
    def tokens(self) -> int:
        """Tokens L."""
        return self.context.shape[1]

    def filled(self, length: int) -> Padded | None:
        """How the prompt is told that is repeated to a length; None where all of its tokens count."""
        cut = length % self.tokens
        return Padded(repeated(self.context, length), length - cut) if cut else None


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


# ---- SDXL's pooled output -------------------------------------------------------------------------------------------


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


# ---- the prompt -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prompted:
    """What Multimodal Prompt gives: the model with its cache, two CONDITIONINGs of one length, what they hold.

    seen: both prompts as the encoder is given them, an IMAGE.
    """

    model: Any
    positive: list
    negative: list
    report: str
    seen: Tensor


def prompt(
    model: Any,
    encoder: MultimodalEncoder,
    images: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    settings: PromptSettings,
    clip: Any = None,
) -> Prompted:
    """CONDITIONING of a positive and a negative prompt with their pictures; images and masks by the id of their input.

    The shorter one is repeated to the length of the longer, so that the host joins them in one batch; on the returned
    model the part of a repetition that is cut off does not count.
    """
    prompts = fill(settings.texts, numbered(images, masks, BACKGROUND[settings.background]))
    connector = encoder.require_connector()
    refuse_mismatch(model, connector)
    tokens = settings.tokens(connector.reads.tokens)
    prompts = {name: with_tokens(each, tokens) for name, each in prompts.items()}
    encoded = encode(encoder, list(prompts.values()))
    length = max(each.tokens for each in encoded)
    make_pooled = POOLED[settings.pooled_output]
    conditioning = [
        [[repeated(each.context, length), {"pooled_output": make_pooled(each, text, clip)}]]
        for each, text in zip(encoded, settings.texts.values(), strict=True)
    ]
    padded = tuple(filter(None, (each.filled(length) for each in encoded)))
    report, seen = describe_prompt(encoder, encoded, length), layout_picture(encoder.vlm, prompts, length)
    return Prompted(cache_context(model, padded), *conditioning, report, seen)


def refuse_mismatch(model: Any, connector: Connector) -> None:
    """Raise ValueError where the U-Net reads tokens of another width than are made."""
    wanted, made = context_width(model), connector.config.context_width
    if wanted != made:
        raise ValueError(
            f"the connector makes tokens of {made} channels ({FAMILIES.get(made, 'another model')}), this model reads "
            f"{wanted} ({FAMILIES.get(wanted, 'another model')}): load a checkpoint of the family that the connector "
            "was trained for."
        )


def describe_prompt(encoder: MultimodalEncoder, encoded: Sequence[Encoded], length: int) -> str:
    """Which tokens are what, and how many of those the model can read were used."""
    positive, negative = encoded
    parts = " | ".join(map(describe_span, positive.layout))
    lines = [
        f"{positive.tokens} tokens of {encoder.vlm.limit}: {parts}",
        f"negative {negative.tokens} tokens, both brought to {length}",
    ]
    return "\n".join(lines)


def describe_span(span: Span) -> str:
    """A text or a picture, with its tokens."""
    if span.picture is None:
        return f"text {span.tokens}"
    weight = "" if span.picture.weight == 1.0 else f", weight {span.picture.weight:g}"
    return f"{span.picture.name} {span.tokens} ({span.side} px{weight})"
