"""8-channel U-Nets in diffusers' names, which the host's loader refuses: it takes them by the names of checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..host import picture_channels
from .folder import tensors_of

FIRST = "conv_in.weight"  # in diffusers' names alone
CHECKPOINT = "model.diffusion_model."


def layout(names: Iterable[str]) -> dict[str, Any]:
    """The layout of a U-Net, as the host writes it, of its tensors' names in diffusers'.

    Counted: residual blocks and transformers' depths of each down block, of the middle and of the up blocks.
    """
    names = list(names)
    blocks = count(names, r"down_blocks\.(\d+)\.")
    residual = [count(names, rf"down_blocks\.{i}\.resnets\.(\d+)\.") for i in range(blocks)]
    down = [depth(names, f"down_blocks.{i}.attentions.{j}") for i in range(blocks) for j in range(residual[i])]
    up = [depth(names, f"up_blocks.{i}.attentions.{j}") for i in range(blocks) for j in range(residual[-1 - i] + 1)]
    return {
        "num_res_blocks": residual,
        "channel_mult": [1] * blocks,  # the host counts its blocks only
        "transformer_depth": down,
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": depth(names, "mid_block.attentions.0"),
    }


def count(names: Iterable[str], pattern: str) -> int:
    """How many of something there are, numbered from 0 in a pattern's group."""
    found = {int(match.group(1)) for match in (re.match(pattern, name) for name in names) if match}
    return len(found)


def depth(names: Iterable[str], place: str) -> int:
    """Blocks of the transformer at a place."""
    return count(names, rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.")


def renamed(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A U-Net's tensors in the names of checkpoints. Raises ValueError for one that has no name there."""
    import comfy.utils

    if FIRST not in tensors:
        return dict(tensors)
    table = comfy.utils.unet_to_diffusers(layout(tensors))
    found = {table[key]: tensor for key, tensor in tensors.items() if key in table}
    odd = sorted(tensors.keys() - table.keys())
    if odd:
        raise ValueError(
            f"{name} holds {odd[0][:60]!r}, which is no tensor of a U-Net that is read here: take unet.safetensors of "
            "an SD 1.5 or SDXL model."
        )
    return found


def load_unet(path: Path, disable_dynamic: bool = False) -> Any:
    """The host's MODEL of an InstructPix2Pix U-Net's file, as the host's own loader of such files would give it.

    Raises ValueError for another kind of network, and for one that is given no picture.
    """
    import comfy.sd

    name = f"{path.parent.name}/{path.name}"
    tensors = {key.removeprefix(CHECKPOINT): tensor for key, tensor in tensors_of(path)}
    how = {"disable_dynamic": True} if disable_dynamic else {}  # which older hosts do not know
    model = comfy.sd.load_diffusion_model_state_dict(renamed(tensors, name), **how)
    if model is None:
        raise ValueError(
            f"{name} is no U-Net of SD 1.5 or SDXL: convert the published files again, see the help page of Load MGIE."
        )
    if not picture_channels(model):
        raise ValueError(
            f"{name} is a U-Net that is given no picture (4 channels, InstructPix2Pix has 8): take MGIE's own U-Net, "
            "or load this one by Load Diffusion Model."
        )
    model.cached_patcher_init = (load_unet, (path,))  # by which the host loads it into ordinary memory
    return model
