"""The vision-language model's part in a training: which of its layers learn, their file, and its own checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ... import host
from ...training import Factors, linear_layers
from .gradient import TECHNIQUE

# The layers that Idefics2's authors train in their own LoRA recipe, without the perceiver.
LANGUAGE = re.compile(
    r"(text_model|language_model|modality_projection)(?!.*perceiver)(.*\.(q|k|v|o|gate|up|down)_proj|.*\.proj)$"
    r"|^visual\.merger\.mlp\.\d+$"
)
UNET = re.compile(r"\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$")


def unet_factors(model: Any, rank: int, seed: int) -> Factors:
    """Factors for every attention projection of a host MODEL."""
    return Factors(linear_layers(host.require_unet(model, TECHNIQUE), UNET), rank, seed)


def language_factors(model: nn.Module, rank: int, seed: int) -> Factors:
    """Factors for the language model and the layers between it and its vision tower, which itself is not trained."""
    return Factors(linear_layers(model, LANGUAGE), rank, seed)


def language_file(factors: Factors) -> dict[str, Tensor]:
    """What Load Multimodal Encoder takes, and PEFT's own names behind their first part."""
    return factors.file(lambda name: name, "lora_B", "lora_A")


@contextmanager
def language_checkpointing(text: nn.Module, wanted: bool) -> Iterator[None]:
    """Within, transformers' own gradient checkpointing runs in a language model, and no dropout."""
    if not wanted:
        yield
        return
    now = "activation" if hasattr(text, "activation_checkpointing_enable") else "gradient"
    before = {module: (module.training, set(module._forward_hooks)) for module in text.modules()}
    try:
        getattr(text, f"{now}_checkpointing_enable")({"use_reentrant": False})
        for module in text.modules():
            module.training = hasattr(module, "gradient_checkpointing") or module.training
        yield
    finally:
        getattr(text, f"{now}_checkpointing_disable")()
        for module, (training, hooks) in before.items():
            module.training = training
            for hook in module._forward_hooks.keys() - hooks:  # transformers leaves one on the token table
                del module._forward_hooks[hook]
