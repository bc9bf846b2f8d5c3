"""The header of a saved file, read value by value: typed and in its range before anything is built from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from torch import Tensor

from .foreign import deeper_than
from .quoting import quoted

Record = TypeVar("Record")
MOST = 1 << 31
DEEPEST = 16  # records in records
KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "a record",
    list: "a list",
}
ANYTHING = (-1e300, 1e300)


def typed(name: str, value: Any, kind: type, low: float = 0, high: float = MOST) -> Any:
    """A value of JSON as what it should be. Raises ValueError that names it, and what it should be.

    A number must be finite and from low to high; true is no number.
    """
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"its {name} should be {KINDS[kind]}, it is {quoted(value)}")
    if kind in (int, float) and not low <= value <= high:
        raise ValueError(f"its {name} should be from {low:g} to {high:g}, it is {quoted(value)}")
    return float(value) if kind is float else value


def record(name: str, value: Any, kind: type[Record], **ranges: tuple[float, float]) -> Record:
    """A dataclass of what JSON says; ranges: of its numbers, where they are not from 0 to 2 ** 31.

    Raises ValueError for anything that is missing, unknown, of another type, or out of its range.
    """
    value, hints = typed(name, value, dict), get_type_hints(kind)
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    for word, odd in (("lacks", needed - value.keys()), ("has", value.keys() - hints.keys())):
        if odd:
            raise ValueError(f"its {name} {word} {quoted(min(odd))}")
    found = {key: typed(f"{name}'s {key}", each, hints[key], *ranges.get(key, ())) for key, each in value.items()}
    return kind(**found)


class Header(dict[str, str]):
    """A file's header. What is missing or odd raises ValueError that says so."""

    def __missing__(self, key: str) -> str:
        raise ValueError(f"its header has no {key!r}")

    def text(self, key: str) -> str:
        """A short text of one line."""
        value = self[key]
        if len(value) > 200 or not value.isprintable() or "<" in value:
            raise ValueError(f"its {key} is no name, but {quoted(value)}")
        return value

    def json(self, key: str, kind: type) -> Any:
        """A value of JSON."""
        try:
            value = json.loads(self[key])
        except RecursionError:
            raise ValueError(f"its {key} is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"its {key} cannot be read ({error})") from None
        return typed(key, value, kind)

    def numbers(
        self, key: str, kind: type = float, *, low: float = 0, high: float = MOST, count: int | None = None
    ) -> tuple:
        """Several numbers, each from low to high; count: how many, where that is known."""
        found = self.json(key, list)
        if count not in (None, len(found)):
            raise ValueError(f"its {key} should hold {count} numbers, it holds {len(found)}")
        return tuple(typed(key, value, kind, low, high) for value in found)

    def record(self, key: str, kind: type[Record], **ranges: tuple[float, float]) -> Record:
        """A dataclass; see `record`."""
        return record(key, self.json(key, dict), kind, **ranges)

    def records(self, key: str, kind: type[Record], **ranges: tuple[float, float]) -> tuple[Record, ...]:
        """Several of a dataclass."""
        return tuple(record(key, value, kind, **ranges) for value in self.json(key, list))

    def info(self, **known: type) -> dict:
        """What its maker wrote about itself, as plain values; known: the types of those that are used.

        Numbers need not be finite: a measurement may have been none.
        """
        found = self.json("info", dict)
        if deeper_than(found, DEEPEST):
            raise ValueError("its info is nested too deeply")
        for key, kind in known.items():
            if key in found and kind is list:
                values = typed(f"info's {key}", found[key], list)
                found[key] = [plain_number(f"info's {key}", value) for value in values]
            elif key in found and kind is float:
                plain_number(f"info's {key}", found[key])
            elif key in found:
                typed(f"info's {key}", found[key], kind)
        return found


def plain_number(name: str, value: Any) -> float:
    """A number, finite or not. Raises ValueError for anything else."""
    return value if isinstance(value, float) else typed(name, value, float, *ANYTHING)


def told(info: dict) -> list[str]:
    """What a maker wrote about itself, a few words each."""
    words = []
    for name, value in info.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f"{name[:60]} {text if len(text) <= 120 else text[:117] + '...'}")
    return words


class Tensors(Mapping[str, Tensor]):
    """A file's tensors, read when they are asked for; `shapes` and `kinds` ("F32", ...) are known before.

    file: an open safetensors file.
    """

    def __init__(self, file: Any):
        self.file = file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
        self.shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
        self.kinds = {name: str(found.get_dtype()) for name, found in slices.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def require(self, name: str, *shape: int | None, kinds: tuple[str, ...] = ("F16", "BF16", "F32")) -> None:
        """Raise ValueError where a tensor is missing, or has another shape (None: any size but 0) or type of number."""
        if name not in self.shapes:
            raise ValueError(f"it has no tensor {name!r}")
        found, kind = self.shapes[name], self.kinds[name]
        fits = len(found) == len(shape) and all(
            has == wanted or (wanted is None and has) for has, wanted in zip(found, shape, strict=True)
        )
        if not fits:
            wanted = " x ".join("n" if size is None else str(size) for size in shape)
            raise ValueError(f"its {name} {found} and its header do not fit: {wanted} is wanted")
        if kind not in kinds:
            raise ValueError(f"its {name} holds {kind} numbers instead of {' or '.join(kinds)}")

    def refuse_others(self, known: set[str]) -> None:
        """Raise ValueError for tensors that do not belong to it."""
        odd = sorted(self.shapes.keys() - known)
        if odd:
            raise ValueError(f"{len(odd)} of its tensors do not belong to it, {quoted(odd[0])} for one")
