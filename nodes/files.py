"""Folders under the host's models: registered, listed; files of them written whole, read with care."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Thing = TypeVar("Thing")
Network = TypeVar("Network", bound=torch.nn.Module)


def register_folder(name: str, note: str) -> None:
    """Tell the host about models/<name>; only .safetensors files of it are ever listed.

    A new folder is made with an empty file in it whose name says what belongs there, as the host's own folders have.
    """
    import folder_paths

    path = os.path.join(folder_paths.models_dir, name)
    paths, extensions = folder_paths.folder_names_and_paths.get(name, ([], set()))
    folder_paths.folder_names_and_paths[name] = (
        [*paths, *([] if path in paths else [path])],
        extensions | {".safetensors"},
    )
    if not os.path.isdir(path):
        with contextlib.suppress(OSError):  # a models folder that cannot be written to is still good for reading
            os.makedirs(path)
            Path(path, f"put_{note}_here").touch()


def folders_with(marker: str, roots: Iterable[Path | str]) -> dict[str, Path]:
    """Folders that hold a marker file, by name, directly in some roots or one folder deeper; the first root wins."""
    files = [
        (root, file) for root in map(Path, roots) for deep in ("*", "*/*") for file in root.glob(f"{deep}/{marker}")
    ]
    return {file.parent.relative_to(root).as_posix(): file.parent for root, file in reversed(files)}


def snapshots_in(roots: Iterable[Path | str]) -> dict[str, Path]:
    """Models in caches of the Hugging Face hub, by name: models--<maker>--<model>/snapshots/<revision>."""
    files = [(root, file) for root in map(Path, roots) for file in root.glob("models--*/snapshots/*/config.json")]
    return {file.parent.relative_to(root).as_posix(): file.parent for root, file in reversed(files)}


def safe_name(prefix: str, kind: str, example: str) -> str:
    """A name without what could leave its folder: letters, digits, blank, dash, underscore and dot, at most 80.

    Raises ValueError for a prefix with no letter or digit in it.
    """
    name = re.sub(r"[^\w\-. ]", "", prefix).strip(". ")[:80]
    if not name:
        raise ValueError(f"{kind} name {prefix!r} has no letters or digits: write a name such as {example!r}.")
    return name


def first_free(folder: Path, name: str, ending: str = "") -> Path:
    """The first of <name>_00001<ending>, <name>_00002<ending>, ... that does not exist in a folder."""
    number = 1
    while (folder / f"{name}_{number:05}{ending}").exists():
        number += 1
    return folder / f"{name}_{number:05}{ending}"


def filled(build: Callable[..., Network], config: Any, tensors: dict[str, Tensor]) -> Network:
    """build(config, dtype) with a file's tensors in it. Raises ValueError for tensors that are not its own, and NaN."""
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
    return network


@dataclass(frozen=True)
class ModelFolders:
    """models/<folder>, with whole folders of models as transformers writes them (config.json beside the weights).

    put: what belongs there, in the name of its note; what: a folder of it, as messages say it; hint: what to put there.
    """

    folder: str
    put: str
    what: str
    hint: str

    def register(self) -> None:
        """Tell the host about the folder."""
        register_folder(self.folder, self.put)

    def found(self) -> dict[str, Path]:
        """Where each lies, by name; none where the host was not told of the folder yet."""
        import folder_paths

        if self.folder not in folder_paths.folder_names_and_paths:
            return {}
        roots = folder_paths.get_folder_paths(self.folder)
        return snapshots_in(roots) | folders_with("config.json", roots)

    def path(self, name: str) -> Path:
        """Where one lies. Raises ValueError for a name that is none of them."""
        known = self.found()
        if name not in known:
            have = ", ".join(sorted(known)) or "nothing"
            raise ValueError(f"models/{self.folder} has no {self.what} {name!r}, it has {have}: {self.hint}.")
        return known[name]


@dataclass(frozen=True)
class Shelf:
    """models/<folder>, with files of one format.

    what: the kind of file and the node that saves it, as error messages say them; example: a file name to suggest;
    room: what to do when the disk is full; older: what to do about files of earlier versions; put: what belongs there,
    in the name of its note.
    """

    folder: str
    format: str
    version: int
    what: tuple[str, str]
    example: str
    room: str
    older: str = "an early version of this pack, before its first release: make it again."
    put: str = "files"

    def register(self) -> None:
        """Tell the host about the folder; only .safetensors files of it are ever listed."""
        register_folder(self.folder, self.put)

    def listed(self) -> list[str]:
        """Names of the saved files, as a loader offers them; none where the host was not told of the folder yet."""
        import folder_paths

        known = self.folder in folder_paths.folder_names_and_paths
        return folder_paths.get_filename_list(self.folder) if known else []

    def path(self, file: str) -> str:
        """Where a listed file lies. Raises FileNotFoundError, as the host's loaders do, for one that is gone."""
        import folder_paths

        return folder_paths.get_full_path_or_raise(self.folder, file)

    def fingerprint(self, file: str) -> str:
        """What changes when a file does: for a loader's fingerprint_inputs."""
        import folder_paths

        path = folder_paths.get_full_path(self.folder, file)
        return f"{file} {os.path.getmtime(path) if path else 'missing'}"

    def new_path(self, prefix: str) -> Path:
        """The first free `<prefix>_00001.safetensors`. Raises ValueError as safe_name does."""
        import folder_paths

        name = safe_name(prefix, "file", self.example)
        folder = Path(folder_paths.get_folder_paths(self.folder)[0])
        folder.mkdir(parents=True, exist_ok=True)
        return first_free(folder, name, ".safetensors")

    def write(self, path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        """Write a file so that it is whole or not there. Raises OSError with a way out when the disk is full."""
        needed, free = sum(t.numel() * t.element_size() for t in tensors.values()), shutil.disk_usage(path.parent).free
        if free < needed + (1 << 20):
            raise OSError(
                f"{path.name} needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free: make room, or "
                f"{self.room}."
            )
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        mark = {"format": self.format, "version": str(self.version)}
        try:
            save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata=mark | header)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read(self, path: str, build: Callable[[dict[str, str], dict[str, Tensor]], Thing]) -> Thing:
        """build(header, tensors) of a file; it raises KeyError, TypeError, ValueError or RuntimeError for nonsense.

        Raises ValueError that says what is wrong with a foreign, newer, older, cut-off or damaged file.
        """
        name, (kind, saver) = os.path.basename(path), self.what
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                header = file.metadata() or {}
                if header.get("format") != self.format:
                    raise ValueError(
                        f"{name} is not {kind} (no {self.format!r} mark in it): pick a file that {saver} wrote."
                    )
                version = header.get("version", "")
                if version != str(self.version):
                    newer = version.isdigit() and int(version) > self.version
                    by = "a newer version of this pack: update Palimpsest to read it." if newer else self.older
                    raise ValueError(f"{name} was saved by {by}")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
        except SafetensorError as error:
            raise ValueError(
                f"{name} is cut off or damaged ({error}): save it again, or copy it again from its source."
            ) from error
        try:
            return build(header, tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{name} is damaged: {str(error).rstrip('.')}. Save it again.") from error
