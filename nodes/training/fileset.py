"""The files that a training leaves in several folders, under one name: tried before, and all kept that can."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..files import Shelf
from ..names import first_free, safe_name
from ..writing import try_to_write

Content = tuple[dict[str, Tensor], dict[str, str]]  # tensors and header


@dataclass
class FileSet:
    """Files of one training: one name, and a number under which none of them is taken.

    places: by part, its shelf and what stands behind the number ("_unet"). paths: where each lies. own: parts that
    were written, which may be written anew.
    """

    name: str
    places: dict[str, tuple[Shelf, str]]
    paths: dict[str, Path] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)

    @classmethod
    def new(cls, prefix: str, places: dict[str, tuple[Shelf, str]], needed: Iterable[str] | None = None) -> FileSet:
        """Names that are free, in folders that were tried; needed: the parts to try, where that is not all of them.

        Raises ValueError for a prefix with no letter or digit in it, OSError for what cannot be written.
        """
        shelf, _ = next(iter(places.values()))
        found = cls(safe_name(prefix, "file", shelf.example), places)
        found.renumber()
        try_to_write(found.paths[part] for part in (places if needed is None else needed))
        return found

    def renumber(self) -> None:
        """Take the first number that is free for all of them."""

        def numbered(number: int) -> list[Path]:
            return [shelf.numbered(self.name, number, behind) for shelf, behind in self.places.values()]

        self.paths = dict(zip(self.places, first_free(numbered), strict=True))

    def listed(self, parts: Iterable[str]) -> list[str]:
        """Some of the files, as people find them."""
        found = []
        for part in parts:
            shelf, _ = self.places[part]
            found.append(f"models/{shelf.folder}/{shelf.name(self.paths[part])}")
        return found

    def require_room(self, sizes: dict[str, int], *, again: bool = False) -> None:
        """Raise OSError where a disk has too little room for parts of these bytes.

        again: they will be written anew; the largest counts twice, for it takes the earlier one's place when whole.
        """
        disks: dict[int, dict[str, int]] = {}
        for part in sizes:
            place = next(folder for folder in self.paths[part].parents if folder.exists())
            disks.setdefault(os.stat(place).st_dev, {})[part] = sizes[part]
        for found in disks.values():
            largest = max(found, key=lambda part: found[part])
            shelf, _ = self.places[largest]
            files = {self.paths[part]: size for part, size in found.items()}
            size = found[largest] * (2 if again else 1)
            shelf.require_room({self.paths[largest]: size} | files | {self.paths[largest]: size})

    def write(self, contents: dict[str, Content]) -> list[str]:
        """Write the parts, whatever becomes of the others; returns what was written, as people find it.

        Raises OSError at the end that names what was kept, and why the rest was not.
        """
        first, written, failed = not self.own, [], []
        for part, (tensors, header) in contents.items():
            shelf, _ = self.places[part]
            try:
                shelf.write(self.paths[part], tensors, header, over=part in self.own)
            except FileExistsError:  # another ComfyUI took this number meanwhile
                if first:
                    self.give_up(written)
                    return self.write(contents)
                failed.append(f"{self.listed([part])[0]} is there already")
            except OSError as error:
                failed.append(str(error).rstrip("."))
            else:
                written.append(part)
                self.own += [] if part in self.own else [part]
        if failed:
            kept = ", ".join(self.listed(self.own)) or "nothing"
            raise OSError(f"not all of the training was saved: {'; '.join(failed)}. Kept: {kept}.")
        return self.listed(written)

    def give_up(self, written: list[str]) -> None:
        """Take the next number for all of them, without what was written under this one."""
        for part in written:
            with contextlib.suppress(OSError):
                self.paths[part].unlink()
        self.own.clear()
        self.renumber()
