"""Keys and values of a prompt kept over the steps of a run: they depend on the prompt and the weights, not on the step.

At 1000 tokens the keys and values of SDXL's 70 cross-attention layers are a tenth of every step, at 5000 half of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host

NAME = "palimpsest_context_cache"
SHARE = 0.5  # of the device's free memory that one kind of call may fill
KINDS = 8  # kinds of calls (prompts together, each alone, in areas) that one run keeps at a time


@dataclass(frozen=True, eq=False)
class Padded:
    """A prompt (1, L, C) that was filled up by repeating it: its tokens from `end` on are not to count."""

    context: Tensor
    end: int

    def rows(self, context: Tensor) -> Tensor:
        """Which tokens of a sampled context (R, M, C) are this prompt's filling: (R, M), True where they are.

        The host repeats a whole prompt to join it with a longer one; it is filled up in every copy.
        """
        length = self.context.shape[1]
        if context.shape[1] % length or context.shape[2] != self.context.shape[2]:
            return torch.zeros(context.shape[:2], dtype=torch.bool, device=context.device)
        here = (context[:, :length] == self.context.to(context)).flatten(1).all(1)
        filling = torch.arange(context.shape[1], device=context.device) % length >= self.end
        return here[:, None] & filling


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device."""
    import comfy.model_management

    return comfy.model_management.get_free_memory(device)


@dataclass(eq=False)
class Kept:
    """What is kept of one context (R, M, C): keys and values (R, M, D) by layer, and the tokens that do not count.

    left_out (R, M): True for those, or None where all count. keep: whether there is memory for keys and values.
    """

    context: Tensor
    left_out: Tensor | None
    keep: bool
    pairs: dict[host.LayerKey, tuple[Tensor, Tensor]] = field(default_factory=dict)
    biases: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def bias(self, dtype: torch.dtype, keys: int) -> Tensor | None:
        """What is added to a layer's scores, (R, 1, 1, keys): -inf at tokens that do not count; None where all do.

        Keys behind the context's own are what another node added.
        """
        if self.left_out is None or keys < self.left_out.shape[1]:
            return None
        if dtype not in self.biases:
            zeros = torch.zeros(self.left_out.shape, dtype=dtype, device=self.left_out.device)
            self.biases[dtype] = zeros.masked_fill_(self.left_out, -torch.inf)[:, None, None]
        return F.pad(self.biases[dtype], (0, keys - self.left_out.shape[1]))


class Memory:
    """What one sampling run keeps, what was made last coming first. keeps: whether it may at all."""

    def __init__(self, keeps: bool = True) -> None:
        self.kept: list[Kept] = []
        self.keeps, self.misses = keeps, 0

    @classmethod
    def of(cls, run: host.Run) -> Memory:
        """A run's, the same in all of its calls.

        Prompts with hooks bring weights of their own, which may change over the steps: nothing is kept beside them.
        Nor is in a call from outside of a run, which has no prompts.
        """
        hooked = any(cond.get("hooks") for cond in run.every_cond)
        return run.kept(NAME, lambda: cls(keeps=bool(run.conds) and not hooked))

    def find(self, context: Tensor, padded: tuple[Padded, ...], channels: int) -> Kept:
        """What is kept of this very context; else a new place for it, if there is memory for so many channels.

        Contexts are told apart by what is in them, so that nothing another node does to a prompt is missed. Where
        they change at every step nothing is kept after a few.
        """
        for kept in self.kept:
            if same(kept.context, context):
                self.misses = 0
                return kept
        self.misses += 1
        size = 2 * channels * context.shape[0] * context.shape[1] * context.element_size()
        keep = self.keeps and self.misses <= KINDS and size <= SHARE * free_memory(context.device)
        self.kept = [Kept(context, left_out(context, padded), keep), *self.kept[: KINDS - 1]]
        return self.kept[0]


def left_out(context: Tensor, padded: tuple[Padded, ...]) -> Tensor | None:
    """Tokens of a context that are a prompt's filling: (R, M), True for those, or None where there are none."""
    if not padded:
        return None
    found = torch.stack([prompt.rows(context) for prompt in padded]).any(0)
    return found if bool(found.any()) else None


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in everything."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool((a == b).all())


@dataclass(frozen=True, eq=False)
class ContextCall:
    """One call of the U-Net: what is kept of its context, and the replacements it meets.

    taken: blocks and layers that have one; free: those where ours is the outermost.
    """

    kept: Kept
    free: frozenset[tuple]
    taken: frozenset[tuple]

    def keeps(self, layer: host.LayerKey) -> bool:
        """Whether a layer's keys and values may come from memory."""
        return self.kept.keep and (layer if layer in self.taken else layer[:2]) in self.free


# ---- what the host calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FindContext:
    """DIFFUSION_MODEL wrapper: tell the layers what is kept of the context that the U-Net is given.

    channels: of keys in all layers together. Where a gradient is wanted, or another node changes the text in the
    layers, nothing is kept.
    """

    padded: tuple[Padded, ...]
    channels: int

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        options = dict(transformer_options or {})
        if isinstance(context, Tensor) and context.ndim == 3:
            options[NAME] = self.call(options, context)
        return executor(x, timesteps, context, y, control, options, **kwargs)

    @host.not_compiled
    def call(self, options: dict, context: Tensor) -> ContextCall:
        """What is known in this call."""
        text_patches, call = options.get("patches", {}).get("attn2_patch", ()), host.call_of(options)
        alone = all(isinstance(patch, SkipProjection) for patch in text_patches)
        may_keep = alone and call is not None and not torch.is_grad_enabled()
        memory = Memory.of(call.run) if may_keep else Memory(keeps=False)
        kept = memory.find(context, self.padded, self.channels)
        slots = options.get("patches_replace", {}).get("attn2", {})
        free = frozenset(key for key in slots if isinstance(slots[key], KeptAttention))
        return ContextCall(kept, free, frozenset(slots))


@dataclass(frozen=True)
class SkipProjection:
    """attn2_patch: where a layer's keys and values are kept, only one token of the context is projected."""

    @host.not_compiled
    def __call__(self, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        call, layer = options.get(NAME), host.layer_key(options)
        if call is None or not call.keeps(layer) or layer not in call.kept.pairs:
            return n, context, value
        return n, context[:, :1], value[:, :1]


@dataclass(frozen=True)
class KeptAttention:
    """attn2 replacement: the layer's attention with keys and values from memory, without tokens that do not count.

    previous: another node's replacement that was here before; beside tokens that do not count, the result is
    previous(Q, K, V) + counted(Q, K, V) - plain(Q, K, V), exact for those that add to the plain attention.
    """

    previous: Any = None

    @host.not_compiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        call, layer = options.get(NAME), host.layer_key(options)
        if call is None:
            return host.run_attention(options, self.previous, query, key, value)
        if call.keeps(layer):
            key, value = call.kept.pairs.setdefault(layer, (key, value))
        bias = call.kept.bias(host.attention_dtype(options, query), key.shape[1])
        if bias is None:
            return host.run_attention(options, self.previous, query, key, value)
        counted = host.biased_attention(options, query, key, value, bias)
        if self.previous is None:
            return counted
        plain = host.run_attention(options, None, query, key, value)
        return self.previous(query, key, value, options) + counted - plain


def cache_context(model: Any, padded: tuple[Padded, ...] = ()) -> Any:
    """A clone of the model that keeps keys and values of its prompts over the steps: the same picture, bit for bit.

    padded: prompts whose filling is not to count. Raises ValueError for models other than U-Nets.
    """
    from comfy.patcher_extension import WrappersMP

    layers = host.cross_attention_layers(model, "Multimodal Prompt")
    patched = model.clone()
    host.observe(patched)
    earlier = patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, NAME)
    if earlier:
        patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, NAME)
        padded = (*earlier[0].padded, *padded)
    else:
        host.replace_attention(patched, "attn2", layers, KeptAttention)
        patched.set_model_attn2_patch(SkipProjection())
    find = FindContext(padded, sum(layer.channels for layer in layers))
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, NAME, find)
    return patched
