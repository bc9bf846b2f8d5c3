"""Context adapters on disk: one .safetensors file in models/palimpsest_context, layout and training in its header."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..files import Shelf, filled
from ..headers import Header, Tensors
from ..quoting import quoted
from ..training import Content, FileSet, lora_shelf
from .adapter import ContextAdapter
from .bias import FORMULAS, PAPER
from .config import AdapterConfig
from .network import build
from .sight import sight_for

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


def content(adapter: ContextAdapter, precision: str = "float32") -> Content:
    """Tensors and header of an adapter's file."""
    header = {"config": json.dumps(adapter.config.header()), "info": json.dumps(adapter.info)}
    return adapter.weights(PRECISIONS[precision]), header


def save_adapter(adapter: ContextAdapter, path: Path, precision: str = "float32") -> None:
    """Write an adapter so that the file is whole or not there. Raises OSError with a way out when that cannot be."""
    SHELF.write(path, *content(adapter, precision))


def rescue_files(name: str, with_lora: bool) -> FileSet:
    """Where an adapter and its LoRA go if the training ends early, tried; raises as FileSet.new does."""
    return FileSet.new(name, {"adapter": (SHELF, "")} | ({"lora": (LORAS, "")} if with_lora else {}))


def load_adapter(path: str) -> ContextAdapter:
    """Read an adapter. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, from_file)


def seeing(adapter: ContextAdapter, clip_vision: Any = None, vae: Any = None, source: Any = None) -> ContextAdapter:
    """An adapter with what its kind sees with. Raises ValueError for what is missing, or of another width."""
    sight = sight_for(adapter.config.kind, clip_vision, vae, source)
    if sight is not None and sight.source is not None:
        adapter.config.refuse_vision(sight.source.shape[-1])
    return replace(adapter, sight=sight)


def from_file(header: Header, tensors: Tensors) -> ContextAdapter:
    """An adapter from a file's header and tensors; raises ValueError where one is nonsense or both disagree."""
    info = header.info(steps=int, formula=str)
    if info.get("formula", PAPER) not in FORMULAS:
        raise ValueError(f"its formula is {quoted(info['formula'])}, there are {', '.join(FORMULAS)}")
    network = filled(build, header.record("config", AdapterConfig), tensors)
    return ContextAdapter.of(network, info)
