"""Blend weights on disk: one small .safetensors file in models/palimpsest_blend."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..files import Shelf
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
    """Write weights so that the file is whole or not there. Raises OSError with a way out when the disk is full."""
    header = {
        "features": json.dumps(list(weights.alphas)),
        "layout": weights.layout,
        "info": json.dumps(weights.info),
    }
    SHELF.write(path, {"alpha": torch.tensor(list(weights.alphas.values()))}, header)


def load(path: str) -> BlendWeights:
    """Read weights. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, from_file)


def from_file(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> BlendWeights:
    """Weights from a file's header and tensors; raises KeyError, TypeError or ValueError where they disagree."""
    names, alphas = json.loads(header["features"]), tensors["alpha"].float()
    if alphas.ndim != 1 or len(names) != len(alphas) or len(set(names)) != len(names):
        raise ValueError(f"its {tuple(alphas.shape)} weights do not fit its list of {len(names)} features.")
    if not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise ValueError("it holds weights outside of 0 to 1.")
    return BlendWeights(dict(zip(names, alphas.tolist(), strict=True)), header["layout"], json.loads(header["info"]))
