"""Context adapters on disk: one .safetensors file in models/palimpsest_context, layout and training in its header."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..files import Shelf, filled
from ..training import lora_shelf
from .adapter import ContextAdapter
from .network import AdapterConfig, build

SHELF = Shelf(
    folder="palimpsest_context",
    format="palimpsest.context_adapter",
    version=1,
    what=("a context adapter", "Save Context Adapter"),
    example="my clip",
    put="context_adapters",
    room="save with precision float16",
)
LORAS = lora_shelf("Train Context Adapter", room="train with a lower lora_rank")
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


def save_adapter(adapter: ContextAdapter, path: Path, precision: str = "float32") -> None:
    """Write an adapter so that the file is whole or not there. Raises OSError with a way out when the disk is full."""
    header = {"config": json.dumps(asdict(adapter.config)), "info": json.dumps(adapter.info)}
    SHELF.write(path, adapter.weights(PRECISIONS[precision]), header)


def save_lora(lora: dict[str, torch.Tensor], name: str) -> None:
    """Write the LoRA that an adapter was trained with to the host's own folder, for its loaders; an empty one is not.

    Raises OSError with a way out when the disk is full.
    """
    if lora:
        LORAS.write(LORAS.new_path(name), lora, {})


def load_adapter(path: str) -> ContextAdapter:
    """Read an adapter. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, from_file)


def from_file(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> ContextAdapter:
    """An adapter from a file's header and tensors; raises KeyError, TypeError, ValueError where they disagree."""
    network = filled(build, AdapterConfig(**json.loads(header["config"])), tensors)
    return ContextAdapter.of(network, json.loads(header["info"]))
