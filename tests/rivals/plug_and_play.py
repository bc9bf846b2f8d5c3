"""Plug-and-play diffusion features (arXiv:2211.12572, Algorithm 1).

    f_t  <- f_t of the source     output of the residual branch of output block 4 of SD 1.5's 12, first 0.8 of the steps
    A_t  <- A_t of the source     Q and K, hence the attention maps, of the decoder's self-attention from that block on,
                                  first 0.5 of the steps

The block is kept as a share, 4/12 of the decoder, so that it is block 4 in SD 1.5 and fits other depths. The prompt of
the negative side stays the one that the other methods get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from palimpsest.nodes import host
from torch import Tensor

from . import source_branch

FEATURES_END = 0.8
ATTENTION_END = 0.5
BLOCK = 4 / 12


def same_layout(query: Tensor, key: Tensor, value: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every row attends where the source does, to its own values."""
    return source_branch.copy_source(query, pictures), source_branch.copy_source(key, pictures), value


@dataclass(frozen=True)
class InjectFeatures:
    """forward_timestep_embed_patch of residual blocks: the source's branch, the edit's own skip connection.

    A residual block is skip(x) + branch(x); the branch is found as the difference, so that the host's block runs as is.
    """

    block: int
    end: float

    def __call__(self, layer: Any, x: Tensor, emb: Tensor, context: Any, options: dict, *_: Any) -> Tensor:
        whole = layer(x, emb)
        now = source_branch.moment(options)
        if now is None or options["block"] != ("output", self.block) or now.progress >= self.end:
            return whole
        skip = layer.skip_connection(x)
        return skip + source_branch.copy_source(whole - skip, now.pictures)


def apply(
    model: Any,
    trajectory: Any,
    prompt: list,
    exact: bool,
    features_end: float = FEATURES_END,
    attention_end: float = ATTENTION_END,
) -> Any:
    """A clone of the model that samples an edit by plug-and-play; `exact` adds direct inversion's offsets.

    Raises ValueError on a host whose residual blocks cannot be patched (before 0.24).
    """
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    if not hasattr(type(model), "set_model_middle_block_after_patch"):  # came together with what is needed here
        raise ValueError("plug-and-play: needs ComfyUI 0.24 or later, which lets patches run residual blocks.")
    patched = source_branch.add(model, trajectory, prompt, exact, max(features_end, attention_end))
    block = round(BLOCK * len(host.require_unet(model, "plug-and-play").output_blocks))
    patched.set_model_forward_timestep_embed_patch((ResBlock, InjectFeatures(block, features_end)))
    for layer in host.self_attention_layers(model, "plug-and-play"):
        if layer.block == "output" and layer.number >= block:
            patched.set_model_attn1_replace(source_branch.SharedAttention(same_layout, 0.0, attention_end), *layer.key)
    return patched
