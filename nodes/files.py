"""Folders under the host's models: registered, listed; files of them written whole, read with care."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import writing
from .headers import Header, Tensors
from .names import first_free, safe_name, within

Thing = TypeVar("Thing")
Network = TypeVar("Network", bound=torch.nn.Module)


def register_folder(name: str, note: str, kinds: frozenset[str] = frozenset({".safetensors"})) -> None:
    """Tell the host about models/<name>; only files of some kinds are ever listed, .safetensors where none are named.

    A new folder is made with an empty file in it whose name says what belongs there, as the host's own folders have.
    """
    import folder_paths

    path = os.path.join(folder_paths.models_dir, name)
    paths, extensions = folder_paths.folder_names_and_paths.get(name, ([], set()))
    folder_paths.folder_names_and_paths[name] = (
        [*paths, *([] if path in paths else [path])],
        extensions | kinds,
    )
    if not os.path.isdir(path):
        with contextlib.suppress(OSError):  # a models folder that cannot be written to is still good for reading
            os.makedirs(path)
            Path(path, f"put_{note}_here").touch()


def folders_with(marker: str, roots: Iterable[Path | str], depth: int = 2) -> dict[str, Path]:
    """Folders that hold a marker file, by name, in some roots or up to `depth` folders deep; the first root wins."""
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        for place, folders, files in os.walk(root, followlinks=True):
            name = Path(place).relative_to(root)
            marked = marker in files and bool(name.parts)
            if marked:
                found.setdefault(name.as_posix(), Path(place))
            if marked or len(name.parts) == depth:
                folders.clear()  # what lies in one of them is a part of it
    return found


def snapshots_in(roots: Iterable[Path | str]) -> dict[str, Path]:
    """Models in caches of the Hugging Face hub, by name: models--<maker>--<model>/snapshots/<revision>."""
    files = [(root, file) for root in map(Path, roots) for file in root.glob("models--*/snapshots/*/config.json")]
    return {file.parent.relative_to(root).as_posix(): file.parent for root, file in reversed(files)}


def filled(build: Callable[..., Network], config: Any, tensors: Tensors) -> Network:
    """build(config, dtype) with a file's tensors in it, which are read when their shapes are known to fit.

    Raises ValueError for tensors that are not its own, and NaN.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in build(config, device="meta").state_dict().items()}
    if tensors.shapes != expected:
        names = tensors.shapes.keys() | expected.keys()
        odd = sorted(name for name in names if tensors.shapes.get(name) != expected.get(name))
        raise ValueError(f"{len(odd)} of its tensors do not fit its layout, {odd[0][:60]} for one.")
    kinds = sorted(set(tensors.kinds.values()))
    if len(kinds) != 1 or kinds[0] not in ("F16", "BF16", "F32"):
        raise ValueError(f"its tensors should share one type of number, F32, F16 or BF16; they have {kinds}.")
    found = dict(tensors)
    if not all(torch.isfinite(tensor).all() for tensor in found.values()):
        raise ValueError("it holds NaN or infinite values.")
    network = build(config, next(iter(found.values())).dtype)
    network.load_state_dict(found)
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

        return folder_paths.get_filename_list(self.folder) if self.known else []

    def path(self, file: str) -> str:
        """Where a listed file lies. Raises FileNotFoundError, as the host's loaders do, for one that is gone."""
        import folder_paths

        return folder_paths.get_full_path_or_raise(self.folder, file)

    def fingerprint(self, file: str) -> str:
        """What changes when a file does: for a loader's fingerprint_inputs."""
        import folder_paths

        path = folder_paths.get_full_path(self.folder, file)
        return f"{file} {os.path.getmtime(path) if path else 'missing'}"

    @property
    def known(self) -> bool:
        """Whether the host was told of the folder yet."""
        import folder_paths

        return self.folder in folder_paths.folder_names_and_paths

    @property
    def root(self) -> Path:
        """Where new files go: the first of the folder's places."""
        import folder_paths

        return Path(folder_paths.get_folder_paths(self.folder)[0])

    def numbered(self, name: str, number: int, behind: str = "") -> Path:
        """Where `<name>_00001<behind>.safetensors` lies. Raises ValueError where a link leads out of the folder."""
        return within(self.root, f"{name}_{number:05}{behind}.safetensors")

    def name(self, path: Path) -> str:
        """A file's name as its loader lists it, with the folders that it lies in."""
        return str(path.relative_to(self.root))

    def new_path(self, prefix: str) -> Path:
        """The first free `<prefix>_00001.safetensors`. Raises ValueError as safe_name does."""
        name = safe_name(prefix, "file", self.example)
        return first_free(lambda number: [self.numbered(name, number)])[0]

    def try_new(self, prefix: str) -> None:
        """See whether a file can be written. Raises ValueError as safe_name does, OSError that says what is wrong."""
        writing.try_to_write([self.new_path(prefix)])

    def write(self, path: Path, tensors: dict[str, Tensor], header: dict[str, str], *, over: bool = False) -> None:
        """Write a file so that it is whole or not there. over: it may take the place of one that is there.

        Raises OSError with a way out where that cannot be, and FileExistsError where the name was taken meanwhile.
        """
        try:
            writing.make_folder(path.parent)
            listed = self.known and path.is_relative_to(self.root)
            writing.clear_leftovers(self.root if listed else path.parent)
            self.require_room({path: size_of(tensors)})
            mark = {"format": self.format, "version": str(self.version)}
            with writing.whole(path, over=over) as made:
                save_file({k: t.contiguous() for k, t in tensors.items()}, made, metadata=mark | header)
        except (FileExistsError, NoRoom):
            raise
        except (OSError, SafetensorError) as error:
            raise writing.not_written(path, error, self.room) from error

    def require_room(self, sizes: dict[Path, int]) -> None:
        """Raise NoRoom where the disk has less room than files of these sizes need."""
        path = next(iter(sizes))
        place = next(folder for folder in path.parents if folder.exists())
        needed, free = sum(sizes.values()), shutil.disk_usage(place).free
        if free < needed + (1 << 20):
            raise NoRoom(
                f"{path.name} needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free: make room, or "
                f"{self.room}."
            )

    @contextmanager
    def guarded(self, path: str) -> Iterator[None]:
        """Within, what nonsense in a file leads to becomes a ValueError with its name."""
        try:
            yield
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:  # RecursionError, too
            raise ValueError(
                f"{os.path.basename(path)} is damaged: {str(error).rstrip('.')}. Save it again."
            ) from error

    def read(self, path: str, build: Callable[[Header, Tensors], Thing]) -> Thing:
        """build(header, tensors) of a file; it raises KeyError, TypeError, ValueError or RuntimeError for nonsense.

        Tensors are read when build asks for them, so that it can look at header and shapes first. Raises ValueError
        that says what is wrong with a foreign, newer, older, cut-off or damaged file.
        """
        name = os.path.basename(path)
        if os.path.isdir(path):
            raise ValueError(f"{name} is a folder: pick a file that {self.what[1]} wrote.")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                header = Header(file.metadata() or {})
                self.require_own(name, header)
                with self.guarded(path):
                    return build(header, Tensors(file))
        except SafetensorError as error:
            raise ValueError(
                f"{name} is cut off or damaged ({error}): save it again, or copy it again from its source."
            ) from error

    def require_own(self, name: str, header: Header) -> None:
        """Raise ValueError for a header of another format or version."""
        kind, saver = self.what
        if header.get("format") != self.format:
            raise ValueError(f"{name} is not {kind} (no {self.format!r} mark in it): pick a file that {saver} wrote.")
        version = header.get("version", "")
        if version != str(self.version):
            newer = re.fullmatch("[0-9]{1,9}", version) and int(version) > self.version
            by = "a newer version of this pack: update Palimpsest to read it." if newer else self.older
            raise ValueError(f"{name} was saved by {by}")


class NoRoom(OSError):
    """A disk has too little room, which is known before anything was written."""


def size_of(tensors: dict[str, Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
