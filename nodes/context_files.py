"""Context adapters on disk: one .safetensors file in models/context_adapters, layout and training in its header."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .patches.context_adapter import AdapterConfig, ContextAdapter, build

FOLDER = "context_adapters"
FORMAT = "palimpsest.context_adapter"
VERSION = 1


def register_folder() -> None:
    """Tell the host about models/context_adapters; only .safetensors files of it are ever listed."""
    import folder_paths

    path = os.path.join(folder_paths.models_dir, FOLDER)
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    folder_paths.folder_names_and_paths[FOLDER] = (
        [*paths, *([] if path in paths else [path])],
        extensions | {".safetensors"},
    )


def listed() -> list[str]:
    """Names of the saved adapters, as the loader offers them; none where the host was not told of the folder yet."""
    import folder_paths

    return folder_paths.get_filename_list(FOLDER) if FOLDER in folder_paths.folder_names_and_paths else []


def new_path(prefix: str) -> Path:
    """The first free `<prefix>_00001.safetensors` in the folder. Raises ValueError for a prefix with no letter in it.

    Everything but letters, digits, blank, dash, underscore and dot is dropped, so no prefix leaves the folder.
    """
    import folder_paths

    name = re.sub(r"[^\w\-. ]", "", prefix).strip(". ")[:80]
    if not name:
        raise ValueError(f"file name {prefix!r} has no letters or digits: write a name such as 'my clip'.")
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (folder / f"{name}_{number:05}.safetensors").exists():
        number += 1
    return folder / f"{name}_{number:05}.safetensors"


def save(adapter: ContextAdapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter so that the file is whole or not there. Raises OSError with a way out when the disk is full."""
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in adapter.weights().items()}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(asdict(adapter.config)),
        "info": json.dumps(adapter.info),
    }
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed + (1 << 20):
        raise OSError(
            f"{path.name} needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free: make room, or save with "
            "precision float16."
        )
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str) -> ContextAdapter:
    """Read an adapter. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    name = os.path.basename(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(
                    f"{name} is not a context adapter (no {FORMAT!r} mark in it): pick a file that Save Context "
                    "Adapter wrote."
                )
            if header.get("version") != str(VERSION):
                raise ValueError(f"{name} was saved by another version of this pack: update Palimpsest to read it.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{name} is cut off or damaged ({error}): save it again, or copy it again from its source."
        ) from error
    try:
        return from_file(header, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is damaged: {error} Save it again.") from error


def from_file(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> ContextAdapter:
    """An adapter from a file's header and tensors; raises KeyError, TypeError, ValueError where they disagree."""
    config, info = AdapterConfig(**json.loads(header["config"])), json.loads(header["info"])
    expected = {name: tensor.shape for name, tensor in build(config, device="meta").state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"{len(odd)} of its tensors do not fit its layout, {odd[0]} for one.")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"its tensors should share one type of number, they have {sorted(map(str, dtypes))}.")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("it holds NaN or infinite values.")
    network = build(config, dtypes.pop())
    network.load_state_dict(tensors)
    return ContextAdapter.of(network, info)
