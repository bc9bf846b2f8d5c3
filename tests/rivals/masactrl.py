"""MasaCtrl: mutual self-attention (arXiv:2304.08465, eq. 3).

    Attention(Q, K_s, V_s)      Q the edit's, K_s and V_s the source's at the same step and layer

from step 4 of 50 on, in the layers from number 10 of the 16 of SD 1.5 on (the paper's S = 4, L = 10: the decoder
without its coarsest attention). Both are kept here as shares, 0.08 of the steps and 10/16 of the layers, so that they
mean the same in SD 1.5 and fit other depths. The mask-guided variant is not built.
"""

from __future__ import annotations

from typing import Any

from palimpsest.nodes import host
from torch import Tensor

from . import source_branch

START = 4 / 50
FIRST_LAYER = 10 / 16


def mutual(query: Tensor, key: Tensor, value: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every row asks with its own Q and is answered from the source's K and V."""
    return query, source_branch.copy_source(key, pictures), source_branch.copy_source(value, pictures)


def apply(
    model: Any,
    trajectory: Any,
    prompt: list,
    exact: bool,
    start: float = START,
    first_layer: float = FIRST_LAYER,
    end: float = 1.0,
) -> Any:
    """A clone of the model that samples an edit by MasaCtrl; `exact` adds direct inversion's offsets to the source."""
    patched = source_branch.add(model, trajectory, prompt, exact, end)
    layers = host.self_attention_layers(model, "MasaCtrl")
    for layer in layers[round(first_layer * len(layers)) :]:
        patched.set_model_attn1_replace(source_branch.SharedAttention(mutual, start, end), *layer.key)
    return patched
