"""A folder of .safetensors files under the host's models: listed, written whole, read with care."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Shelf:
    """models/<folder>, with files of one format.

    what: the kind of file and the node that saves it, as error messages say them; example: a file name to suggest;
    room: what to do when the disk is full; older: what to do about files of earlier versions.
    """

    folder: str
    format: str
    version: int
    what: tuple[str, str]
    example: str
    room: str
    older: str = "an early version of this pack, before its first release: make it again."

    def register(self) -> None:
        """Tell the host about the folder; only .safetensors files of it are ever listed."""
        import folder_paths

        path = os.path.join(folder_paths.models_dir, self.folder)
        paths, extensions = folder_paths.folder_names_and_paths.get(self.folder, ([], set()))
        folder_paths.folder_names_and_paths[self.folder] = (
            [*paths, *([] if path in paths else [path])],
            extensions | {".safetensors"},
        )

    def listed(self) -> list[str]:
        """Names of the saved files, as a loader offers them; none where the host was not told of the folder yet."""
        import folder_paths

        known = self.folder in folder_paths.folder_names_and_paths
        return folder_paths.get_filename_list(self.folder) if known else []

    def new_path(self, prefix: str) -> Path:
        """The first free `<prefix>_00001.safetensors`. Raises ValueError for a prefix with no letter or digit in it.

        Everything but letters, digits, blank, dash, underscore and dot is dropped, so no prefix leaves the folder.
        """
        import folder_paths

        name = re.sub(r"[^\w\-. ]", "", prefix).strip(". ")[:80]
        if not name:
            raise ValueError(f"file name {prefix!r} has no letters or digits: write a name such as {self.example!r}.")
        folder = Path(folder_paths.get_folder_paths(self.folder)[0])
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while (folder / f"{name}_{number:05}.safetensors").exists():
            number += 1
        return folder / f"{name}_{number:05}.safetensors"

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
