"""Multimodal encoders on disk: model folders as transformers writes them, and connectors as .safetensors files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.connector import ConnectorConfig
from .. import files as storage
from ..headers import Header, Tensors
from .encoder import Connector, Reads, build

ENCODERS = storage.ModelFolders(
    folder="palimpsest_encoders",
    put="vision_language_model_folders",
    what="model folder",
    hint="put a folder of a vision-language model there (config.json, tokenizer, .safetensors), and refresh",
)
SHELF = storage.Shelf(
    folder="palimpsest_connectors",
    format="palimpsest.multimodal_connector",
    version=1,
    what=("a multimodal connector", "Train Multimodal Encoder"),
    example="mumu sdxl",
    put="connectors",
    room="save with precision float16",
)
listed, new_path = SHELF.listed, SHELF.new_path
NO_FOLDER = "no folder in models/palimpsest_encoders"


def encoder_folders() -> list[str]:
    """Names of the model folders, as a loader offers them; a sentence where there are none."""
    return sorted(ENCODERS.found()) or [NO_FOLDER]


def lora_files() -> list[str]:
    """LoRA files of the host."""
    import folder_paths

    return folder_paths.get_filename_list("loras")


def content(connector: Connector, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a connector's file."""
    parts = {"config": asdict(connector.config), "reads": asdict(connector.reads), "info": connector.info}
    return connector.weights(dtype), {name: json.dumps(part) for name, part in parts.items()}


def save_connector(connector: Connector, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a connector so that the file is whole or not there. Raises OSError with a way out when that cannot be."""
    SHELF.write(path, *content(connector, dtype))


def load_connector(path: str) -> Connector:
    """Read a connector. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, connector_from)


def connector_from(header: Header, tensors: Tensors) -> Connector:
    """A connector from a file's header and tensors; raises ValueError where one is nonsense or both disagree."""
    reads, info = header.record("reads", Reads, tokens=(1, 1 << 16)), header.info(steps=int)
    return Connector.of(storage.filled(build, header.record("config", ConnectorConfig), tensors), reads, info)
