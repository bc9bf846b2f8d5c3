"""A step of Train LoRA, counted as counting.py counts. Import it where the host can be imported."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from benchmarks import counting
from benchmarks.counting_memory import Memory
from palimpsest.nodes import training
from palimpsest.nodes.lora import training as lora_training
from palimpsest.nodes.lora.layers import unet_layers
from palimpsest.nodes.lora.pictures import Example
from palimpsest.nodes.lora.settings import LoRASettings

# The U-Net alone, rank 32, one picture a step: tests/tiny_models.py has no text encoders of full size.
SETTINGS = LoRASettings(
    epochs=1, repeats=1, rank=32, alpha=16.0, text_rate=0.0, preview_every=0, save_every=0, checkpointing=False
)
TAUGHT = {
    "rank 32": SETTINGS,
    "rank 32, checkpointing": replace(SETTINGS, checkpointing=True),
    "rank 32, convolutions too": replace(SETTINGS, convolutions=True),
}


class Texts:
    """What a training asks of a CLIP whose encoders do not learn."""

    def __init__(self, family: counting.Family):
        self.family, self.cond_stage_model = family, torch.nn.Identity()

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens(self, tokens: str, return_pooled: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        ((context, more),) = self.family.prompt()
        return context, more.get("pooled_output", torch.zeros(1, 1280))


def train(model: Any, family: counting.Family, settings: LoRASettings, steps: int, counter: Any) -> Any:
    """A whole training of so many steps within a counter's context; returns what that gives."""
    network = model.model.diffusion_model
    with torch.inference_mode(False):
        layers = training.weighted_layers(network, unet_layers(model, settings.convolutions))
        factors = {"unet": training.Factors(layers, settings.rank, settings.seed, settings.alpha)}
    found = [Example(family.latent(), "a cat")] * steps
    watch = SimpleNamespace(tell=training.nothing, show=training.nothing, save=training.nothing)
    unread = mock.patch.object(training.History, "note", training.nothing)  # losses without values, which cost nothing
    with torch.inference_mode(), unread, counting.meta_host(), counter as counted:
        lora_training.train(model, Texts(family), found, factors, settings=settings, watch=watch)
    return counted


def step(model: Any, family: counting.Family, name: str) -> counting.Cost:
    """One step: what two take more than one. What autograd keeps is that of one, for a step frees it again."""
    one, two = (train(model, family, TAUGHT[name], n, counting.counting(model.model)).cost for n in (1, 2))
    return replace(two - one, saved=one.saved)


def peak(model: Any, family: counting.Family, name: str) -> int:
    """Bytes that a training holds at most at once beside the model's weights."""
    return train(model, family, TAUGHT[name], 2, Memory(model.model)).peak


def learning(model: Any, name: str) -> list[torch.Tensor]:
    """The factors of a training."""
    settings = TAUGHT[name]
    layers = training.weighted_layers(model.model.diffusion_model, unet_layers(model, settings.convolutions))
    return training.Factors(layers, settings.rank, settings.seed, settings.alpha).parameters()
