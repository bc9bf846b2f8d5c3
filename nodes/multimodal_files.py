"""Multimodal encoders on disk: model folders as transformers writes them, and connectors as .safetensors files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.reference.connector import ConnectorConfig
from .patches.multimodal import Connector, Reads, build
from .storage import Shelf

FOLDER = "multimodal_encoders"
SHELF = Shelf(
    folder="multimodal_connectors",
    format="palimpsest.multimodal_connector",
    version=1,
    what=("a multimodal connector", "Train Multimodal Encoder"),
    example="mumu sdxl",
    room="save with precision float16",
)
new_path = SHELF.new_path
NO_FOLDER = "no folder in models/multimodal_encoders"


def register_folder() -> None:
    """Tell the host about both folders, models/multimodal_encoders and models/multimodal_connectors."""
    import folder_paths

    SHELF.register()
    path = str(Path(folder_paths.models_dir) / FOLDER)
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    folder_paths.folder_names_and_paths[FOLDER] = (
        [*paths, *([] if path in paths else [path])],
        extensions | {".safetensors"},
    )


def listed() -> list[str]:
    """Names of the connector files."""
    return SHELF.listed()


def found() -> dict[str, Path]:
    """Model folders by name: those with a config.json, directly in models/multimodal_encoders or one folder deeper."""
    import folder_paths

    if FOLDER not in folder_paths.folder_names_and_paths:
        return {}
    roots = [Path(path) for path in folder_paths.get_folder_paths(FOLDER)]
    configs = [(root, file) for root in roots for deep in ("*", "*/*") for file in root.glob(f"{deep}/config.json")]
    return {file.parent.relative_to(root).as_posix(): file.parent for root, file in reversed(configs)}


def folders() -> list[str]:
    """Names of the model folders, as a loader offers them; a sentence where there are none."""
    return sorted(found()) or [NO_FOLDER]


def folder_path(name: str) -> Path:
    """Where a model folder lies. Raises ValueError for a name that is none of them."""
    known = found()
    if name not in known:
        have = ", ".join(sorted(known)) or "nothing"
        raise ValueError(
            f"models/{FOLDER} has no model folder {name!r}, it has {have}: put a folder of a vision-language model "
            "there (config.json, tokenizer, .safetensors), and refresh."
        )
    return known[name]


def save(connector: Connector, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a connector so that the file is whole or not there. Raises OSError with a way out when the disk is full."""
    tensors = {name: tensor.to(dtype) for name, tensor in connector.weights().items()}
    parts = {"config": asdict(connector.config), "reads": asdict(connector.reads), "info": connector.info}
    SHELF.write(path, tensors, {name: json.dumps(part) for name, part in parts.items()})


def load(path: str) -> Connector:
    """Read a connector. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, from_file)


def from_file(header: dict[str, str], tensors: dict[str, Tensor]) -> Connector:
    """A connector from a file's header and tensors; raises KeyError, TypeError, ValueError where they disagree."""
    config, reads = ConnectorConfig(**json.loads(header["config"])), Reads(**json.loads(header["reads"]))
    expected = {name: tensor.shape for name, tensor in build(config, device="meta").state_dict().items()}
    have = {name: tensor.shape for name, tensor in tensors.items()}
    if have != expected:
        odd = sorted(name for name in have.keys() | expected.keys() if have.get(name) != expected.get(name))
        raise ValueError(f"{len(odd)} of its tensors do not fit its layout, {odd[0]} for one.")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"its tensors should share one type of number, they have {sorted(map(str, dtypes))}.")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("it holds NaN or infinite values.")
    network = build(config, dtypes.pop())
    network.load_state_dict(tensors)
    return Connector.of(network, reads, json.loads(header["info"]))
