"""Blend weights on disk: one small .safetensors file in models/palimpsest_blend."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..files import Shelf
from ..headers import Header, Tensors, typed
from .weights import BlendWeights

SHELF = Shelf(
    folder="palimpsest_blend",
    format="palimpsest.blend",
    version=1,
    what=("a file of blend weights", "Save Blend Weights"),
    example="my garden",
    put="blend_weights",
    room="clear the temporary files",
)


def save(weights: BlendWeights, path: Path) -> None:
    """Write weights so that the file is whole or not there. Raises OSError with a way out when that cannot be."""
    SHELF.write(path, *content(weights))


def content(weights: BlendWeights) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a file of weights."""
    header = {
        "features": json.dumps(list(weights.alphas)),
        "layout": weights.layout,
        "info": json.dumps(weights.info),
    }
    return {"alpha": torch.tensor(list(weights.alphas.values()))}, header


def load(path: str) -> BlendWeights:
    """Read weights. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, from_file)


def from_file(header: Header, tensors: Tensors) -> BlendWeights:
    """Weights from a file's header and tensors; raises ValueError where one is nonsense or both disagree."""
    names = [typed("features", name, str) for name in header.json("features", list)]
    layout, info = header.text("layout"), header.info(losses=list)
    if tensors.shapes.get("alpha") != (len(names),) or len(set(names)) != len(names):
        raise ValueError(f"its weights {tensors.shapes.get('alpha')} do not fit its list of {len(names)} features")
    tensors.require("alpha", None)
    tensors.refuse_others({"alpha"})
    alphas = tensors["alpha"].float()
    if not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise ValueError("it holds weights outside of 0 to 1")
    return BlendWeights(dict(zip(names, alphas.tolist(), strict=True)), layout, info)
