"""Prompts for a training: encoded once, or each time anew through text encoders that learn."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..host import gradient
from .factors import Factors, act_in

Encoded = tuple[Tensor, Tensor | None]  # tokens (1, L, C), pooled (1, P)


def literal(text: str) -> str:
    """A text whose brackets are read as they stand, not as weights."""
    return re.sub(r"(?<!\\)([()])", r"\\\1", text)


@contextmanager
def cloned_norm_inputs(model: nn.Module) -> Iterator[None]:
    """Within, each layer norm of a text encoder keeps a copy of its input: the host then adds to that in place."""

    def clone(_: nn.Module, inputs: tuple) -> tuple:
        return inputs[0].clone(), *inputs[1:]

    norms = [m for name, m in model.named_modules() if name.endswith(("layer_norm1", "layer_norm2"))]
    handles = [norm.register_forward_pre_hook(clone) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Prompts:
    """What a model reads of texts. factors: of text encoders that learn, which have to be loaded by then; or None.

    clip: the host's CLIP, for factors a clone of it in which they act.
    """

    clip: Any
    factors: Factors | None
    known: dict[str, Encoded] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, clip: Any, factors: Factors | None) -> Prompts:
        """Prompts of a CLIP that stays as it is."""
        if factors is None:
            return cls(clip, None)
        learning = clip.clone()
        act_in(learning.patcher, "", factors)
        return cls(learning, factors)

    def remember(self, texts: list[str]) -> None:
        """Encode texts while the text encoders are at hand; for those that do not learn."""
        for text in texts:
            tokens, pooled = self.clip.encode_from_tokens(self.clip.tokenize(literal(text)), return_pooled=True)
            self.known[text] = tokens.float().cpu().clone(), None if pooled is None else pooled.float().cpu().clone()

    def read(self, text: str, device: torch.device) -> Encoded:
        """A text as the model reads it; with a gradient into the factors where one is wanted."""
        tokens, pooled = self.known[text] if self.factors is None else self.encode(text)
        return tokens.to(device), None if pooled is None else pooled.to(device)

    def encode(self, text: str) -> Encoded:
        """A text as the host's CLIP encodes it; see encode_tokens."""
        return self.encode_tokens(self.clip.tokenize(literal(text)))

    def encode_tokens(self, tokens: dict[str, list]) -> Encoded:
        """As the host's CLIP does, without loading it and on weights that autograd may save.

        Embeddings among the tokens get a gradient.
        """
        model, clip = self.clip.cond_stage_model, self.clip
        model.reset_clip_options()
        if clip.layer_idx is not None:
            model.set_clip_options({"layer": clip.layer_idx})
        model.set_clip_options({"execution_device": clip.patcher.load_device})
        if not self.weights:  # made once the host has loaded them; they stay until the run ends
            self.weights.update((f"network.{name}", plain(weight)) for name, weight in model.named_parameters())
        arguments = (model.encode_token_weights, tokens)
        return torch.func.functional_call(gradient.CallNetwork(model), self.weights, arguments)[:2]

    def batch(self, texts: list[str], device: torch.device) -> Encoded:
        """Several texts as rows; shorter ones are repeated to a common length, as the host does."""
        found = [self.read(text, device) for text in texts]
        whole = math.lcm(*(tokens.shape[1] for tokens, _ in found))
        tokens = torch.cat([tokens.repeat(1, whole // tokens.shape[1], 1) for tokens, _ in found])
        return tokens, None if found[0][1] is None else torch.cat([pooled for _, pooled in found])


def plain(weight: Tensor) -> Tensor:
    """A weight that autograd may save: the same memory where that can be."""
    try:
        return gradient.alias(weight)
    except TypeError:
        return gradient.ordinary(weight)
