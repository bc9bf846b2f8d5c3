"""The attention of a layer: which layer and rows call, what the host would run, and how to stand in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .model import AttentionLayer, LayerKey


def chunk_rows(options: dict, rows: int) -> tuple[int, int]:
    """(chunks, pictures): the host stacks one chunk of B pictures per cond, so rows = chunks * B.

    Raises ValueError if another node's patch added rows that break this order.
    """
    chunks = len(options["cond_or_uncond"])
    if rows % chunks:
        raise ValueError(
            f"attention got {rows} rows for {chunks} prompts: another node on this model adds rows of its own "
            "(a reference picture); put that node after this one or take it out."
        )
    return chunks, rows // chunks


def layer_key(options: dict) -> LayerKey:
    """The layer that calls an attention replacement."""
    return (*options["block"], options["block_index"])


def run_attention(options: dict, previous: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Tensor:
    """The attention the host would have run here: an earlier node's replacement if there is one, else its own.

    query (R, N, C), key and value (R, M, C) after projection, heads not split -> (R, N, C).
    """
    if previous is not None:
        if mask is not None:
            raise ValueError(
                "a strength other than 1 in mode extend, and source masks that differ within a batch, cannot pass "
                "through another node's attention replacement: set strength to 1, or take the other node out."
            )
        return previous(query, key, value, options)
    from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked

    run = optimized_attention if mask is None else optimized_attention_masked
    extra = {} if mask is None else {"mask": mask}
    return run(
        query,
        key,
        value,
        options["n_heads"],
        attn_precision=options["attn_precision"],
        transformer_options=options,
        **extra,
    )


def attention_dtype(options: dict, query: Tensor) -> torch.dtype:
    """In what the host wants attention computed: it has some models, or all on its user's word, in float32."""
    from comfy.ldm.modules.attention import get_attn_precision

    return get_attn_precision(options["attn_precision"], query.dtype) or query.dtype


def biased_attention(options: dict, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's attention with a bias, as the host calls it: the right kernels first, other nodes' overrides honoured.

    The host's own choice will not do: some of its functions refuse a bias, with a warning each time.
    """
    from comfy.ldm.modules.attention import attention_pytorch

    out = attention_pytorch(
        *(t.to(bias.dtype) for t in (query, key, value)),
        options["n_heads"],
        mask=bias,
        attn_precision=options["attn_precision"],
        transformer_options=options,
    )
    return out.to(query.dtype)


# Replacements of the host's own nodes that take as many keys as queries for granted.
SQUARE_ONLY = ("comfy_extras.nodes_sag",)


def replace_attention(
    patched: Any, name: str, layers: list[AttentionLayer], make: Callable[[Any], Callable], longer: bool = False
) -> None:
    """Put a replacement ("attn1" or "attn2") on some layers: make(previous), which calls what was there before.

    It stands under the name of the whole block: the host prefers a single layer's name to a block's, so that under the
    former no node could take a block for a pass of its own any more (perturbed attention does). It must therefore look
    at options["block_index"]. Layers that have a replacement of their own get it there as well. longer: it will pass
    more keys than queries on; raises ValueError where a node of the host cannot take them.
    """
    slots = patched.model_options.get("transformer_options", {}).get("patches_replace", {}).get(name, {})
    present = {key: slots[key] for key in slots}
    for key in sorted({layer.key[:2] for layer in layers} | {la.key for la in layers if la.key in present}, key=str):
        previous = present.get(key)
        if longer and getattr(previous, "__module__", None) in SQUARE_ONLY:
            raise ValueError(
                f"another node records the attention of block {' '.join(map(str, key))} and expects as many keys as "
                "queries (Self-Attention Guidance): put that node after this one."
            )
        getattr(patched, f"set_model_{name}_replace")(make(previous), *key)
