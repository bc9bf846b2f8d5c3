"""What AnyText's parts are called in the files that carry them, and what this pack calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

CONTROL, PROJECTION, READER = "control_model.", "embedding_manager.", "text_predictor."
OWN_READER = "recogniser."  # before this pack's names of a recogniser, in its own files
HINT_BLOCKS = ("glyph_block.", "position_block.", "fuse_block.")
LINEAR = {"weight": "proj.weight", "bias": "proj.bias"}  # the published v1.1 (github.com/tyxsspa/AnyText/issues/131)
NORMED = {  # what the authors' training code has since June 2024, with a LayerNorm
    "weight": "proj.0.weight",
    "bias": "proj.0.bias",
    "norm_weight": "proj.1.weight",
    "norm_bias": "proj.1.bias",
}
ALONE = {"weight": "weight", "bias": "bias"}  # proj.safetensors of the diffusers conversion
PROJECTIONS = (*({k: PROJECTION + v for k, v in each.items()} for each in (NORMED, LINEAR)), NORMED, LINEAR, ALONE)
DIFFUSERS_PREFIXES = ("text_embedding_module.", "controlnet.", "")  # folders of a pipeline, joined into one file
V2_MARKS = re.compile(r"fuse_block_za\.|\.attn[12]x\.|^embedding_manager\.(style_|color_|rgb_|font_|position_)")

# PaddleOCR2Pytorch's names of PP-OCRv3's recogniser, part by part, and this pack's.
READER_PARTS = (
    (r"backbone\.conv1\.", "stem."),
    (r"backbone\.block_list\.(\d+)\._depthwise_conv\.", r"blocks.\1.depth."),
    (r"backbone\.block_list\.(\d+)\._se\.conv1\.", r"blocks.\1.weights.squeeze."),
    (r"backbone\.block_list\.(\d+)\._se\.conv2\.", r"blocks.\1.weights.excite."),
    (r"backbone\.block_list\.(\d+)\._pointwise_conv\.", r"blocks.\1.mix."),
    (r"neck\.encoder\.svtr_block\.(\d+)\.norm1\.", r"columns.\1.norm_attention."),
    (r"neck\.encoder\.svtr_block\.(\d+)\.norm2\.", r"columns.\1.norm_mlp."),
    (r"neck\.encoder\.svtr_block\.(\d+)\.mixer\.qkv\.", r"columns.\1.qkv."),
    (r"neck\.encoder\.svtr_block\.(\d+)\.mixer\.proj\.", r"columns.\1.out."),
    (r"neck\.encoder\.svtr_block\.(\d+)\.mlp\.fc1\.", r"columns.\1.widen."),
    (r"neck\.encoder\.svtr_block\.(\d+)\.mlp\.fc2\.", r"columns.\1.narrow."),
    (r"neck\.encoder\.conv1\.", "narrow."),
    (r"neck\.encoder\.conv2\.", "to_columns."),
    (r"neck\.encoder\.norm\.", "norm."),
    (r"neck\.encoder\.conv3\.", "from_columns."),
    (r"neck\.encoder\.conv4\.", "join."),
    (r"neck\.encoder\.conv1x1\.", "last."),
    (r"head\.fc\.", "head."),
)


def reader_name(theirs: str) -> str:
    """This pack's name of a weight of the recogniser. Raises ValueError for one that PP-OCRv3 does not have."""
    for pattern, ours in READER_PARTS:
        found = re.match(pattern, theirs)
        if found:
            rest = theirs[found.end() :].replace("_conv.", "conv.").replace("_batch_norm.", "norm.")
            return found.expand(ours) + rest
    raise ValueError(f"its recogniser has {theirs[:60]!r}, which PP-OCRv3's has not")


def control_name(theirs: str) -> str:
    """The host's name of a weight of the control, by AnyText's own."""
    return f"input_hint_block.{theirs}" if theirs.startswith(HINT_BLOCKS) else theirs


def published_name(ours: str) -> str:
    """AnyText's name of a weight of the control, by the host's."""
    return CONTROL + ours.removeprefix("input_hint_block.")


def diffusers_names(layout: dict[str, Any], zero_convolutions: int) -> dict[str, str]:
    """The host's name of each weight of a control in a diffusers conversion, by its name there.

    layout: of the U-Net, by the host's names; the rest of it the host knows (unet_to_diffusers).
    """
    import comfy.utils

    blocks = {name: list(value) if isinstance(value, tuple) else value for name, value in layout.items()}
    blocks["transformer_depth_output"] = [1] * sum(n + 1 for n in layout["num_res_blocks"])
    known = {
        theirs: ours for theirs, ours in comfy.utils.unet_to_diffusers(blocks).items() if not ours.startswith("output_")
    }
    ends = ("weight", "bias")
    known |= {f"controlnet_mid_block.{end}": f"middle_block_out.0.{end}" for end in ends}
    for number in range(zero_convolutions):
        known |= {f"controlnet_down_blocks.{number}.{end}": f"zero_convs.{number}.0.{end}" for end in ends}
    return known


def from_diffusers(names: Iterable[str], layout: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name in the file, the host's name) of the weights of a control in a diffusers conversion."""
    names = list(names)
    down = re.compile(r"controlnet_down_blocks\.(\d+)\.weight$")
    known = diffusers_names(layout, sum(bool(down.search(name)) for name in names))
    for name in names:
        bare = without_prefix(name)
        if bare.startswith("controlnet_cond_embedding."):
            yield name, f"input_hint_block.{bare.removeprefix('controlnet_cond_embedding.')}"
        elif bare in known:
            yield name, known[bare]


def without_prefix(name: str) -> str:
    """A name without the pipeline's folder that it lies in."""
    return next(name.removeprefix(prefix) for prefix in DIFFUSERS_PREFIXES if name.startswith(prefix))
