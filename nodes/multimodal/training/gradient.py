"""The host's U-Net with a gradient into the tokens of its prompt: what is patched for it, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import host
from ...host import checkpointing, gradient
from ...training import Factors, ReadTokens, act_in_unet, embedding_weights
from .settings import LEARNED, TrainSettings

TECHNIQUE = "Train Multimodal Encoder"
NAME = "palimpsest_multimodal_training"


@dataclass(frozen=True, eq=False)
class LeaveOutFilling:
    """attn2 replacement: tokens that only fill up a row are not looked at."""

    reader: ReadTokens
    previous: Any

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        mask = self.reader.token_mask
        if mask is None:
            return host.run_attention(options, self.previous, query, key, value)
        added = key.shape[1] - mask.shape[1]  # what another node puts behind the prompt
        mask = F.pad(mask, (0, added), value=True)[:, None, None]
        return host.run_attention(options, self.previous, query, key, value, mask)


def has_replacement(patched: Any, name: str) -> bool:
    """Whether another node replaces the attention `name` anywhere in a MODEL."""
    slots = patched.model_options.get("transformer_options", {}).get("patches_replace", {})
    return bool(slots.get(name))


class UNet:
    """A host MODEL that reads the tokens it is called with.

    together: whether rows of other lengths may share a call. Not where another node replaces the cross-attention, which
    may not know a mask.
    """

    def __init__(self, model: Any, factors: Factors | None, settings: TrainSettings):
        self.host_model, self.factors, self.settings = host.single_device(model), factors, settings
        self.reader, self.together = ReadTokens(), True

    def patched(self) -> Any:
        """A clone of the MODEL with all that a gradient needs; give what the host makes of it to `running`."""
        from comfy.patcher_extension import WrappersMP

        patched, _ = gradient.prepare(self.host_model, host.AttentionLayer("input", 0, 0, 0), False)
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, NAME, self.reader)
        self.together = not has_replacement(patched, "attn2")
        if self.together:
            layers = host.cross_attention_layers(patched, TECHNIQUE)
            host.replace_attention(patched, "attn2", layers, lambda p: LeaveOutFilling(self.reader, p))
        if self.factors is not None:
            act_in_unet(patched, self.factors)
        if self.settings.checkpointing:
            checkpointing.install(patched)
        if self.settings.pooled_output == LEARNED:
            aliases = gradient.AliasWeights(embedding_weights(self.host_model))
            patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, NAME, aliases)
        return patched

    def running(self, model: Any, arguments: dict) -> None:
        """Note what the host's sampler calls: the model inside its guider, and its extra arguments."""
        self.model, self.arguments = model, arguments

    def predict(self, x: Tensor, sigma: Tensor, context: Tensor, token_mask: Tensor, pooled: Tensor) -> Tensor:
        """The model's x_0 of noised pictures (B, C, H, W) at sigma (B,), without guidance.

        Rows of other lengths go in one call, their filling left out; or each by itself, where not `together`.
        """
        reader, whole = self.reader, bool(token_mask.all())
        if self.together or whole:
            reader.context, reader.pooled = context, pooled
            reader.token_mask = None if whole else token_mask
            return self.model(x, sigma, **self.arguments)
        reader.token_mask, found = None, []
        for row, length in enumerate(token_mask.sum(1).tolist()):
            reader.context, reader.pooled = context[row : row + 1, :length], pooled[row : row + 1]
            found.append(self.model(x[row : row + 1], sigma[row : row + 1], **self.arguments))
        return torch.cat(found)
