"""What objects of JSON say, value by value: of its kind and within bounds, else a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from .quoting import quoted

MOST_LETTERS = 1 << 16  # of a caption: more than any of the language models reads at once
MOST_PARTS = 1000  # crops or wholes of a picture: GroundingDINO finds 900 parts at most
MOST_NAME = 1024  # letters of a file's name with its folders


@dataclass(frozen=True)
class Said:
    """An object of JSON whose values are asked for by name and kind. where: what it is, as errors say it.

    Every question raises ValueError where the value is missing, of another kind, or out of its bounds.
    """

    values: dict[str, Any]
    where: str = "it"

    @classmethod
    def of(cls, value: Any, where: str = "it") -> Said:
        """What an object says. Raises ValueError for what is none."""
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {quoted(value)}, an object in braces is read")
        return cls(value, where)

    def value(self, name: str) -> Any:
        """The value of a name, whatever it is."""
        if name not in self.values:
            raise ValueError(f"{self.where} has no {name!r}")
        return self.values[name]

    def refuse(self, name: str, wanted: str) -> ValueError:
        """What to raise for a value that is not what is wanted."""
        return ValueError(f"{name!r} of {self.where} is {quoted(self.values[name])}, {wanted} is read")

    def text(self, name: str, most: int = MOST_LETTERS) -> str:
        """A text of 1 to `most` letters, none of them half of a pair."""
        value = self.value(name)
        if not isinstance(value, str) or not value.strip() or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise self.refuse(name, "a text")
        if len(value) > most:
            raise ValueError(f"{name!r} of {self.where} has {len(value)} letters, at most {most} are read")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """A number from low to high."""
        value = self.value(name)
        if type(value) not in (int, float) or not (math.isfinite(value) and low <= value <= high):
            raise self.refuse(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number from low to high."""
        value = self.value(name)
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def wholes(self, name: str, count: int) -> tuple[int, ...]:
        """So many whole numbers."""
        value = self.value(name)
        if not isinstance(value, list) or len(value) != count or any(type(each) is not int for each in value):
            raise self.refuse(name, f"a list of {count} whole numbers")
        return tuple(value)

    def flag(self, name: str) -> bool:
        """true or false; false where nothing is said."""
        if not isinstance(self.values.get(name, False), bool):
            raise self.refuse(name, "true or false")
        return self.values.get(name, False)

    def file(self, name: str) -> str:
        """The name of a file in the dataset's own folder."""
        value = self.text(name, MOST_NAME)
        if not lies_within(value):
            raise ValueError(f"{quoted(value)} does not lie in the dataset's folder")
        return value

    def parts(self, name: str, kind: type) -> Any:
        """A list or an object of at most MOST_PARTS parts; empty where nothing is said."""
        value = self.values.get(name, kind())
        if not isinstance(value, kind):
            raise self.refuse(name, "a list in brackets" if kind is list else "an object in braces")
        if len(value) > MOST_PARTS:
            raise ValueError(f"{name!r} of {self.where} has {len(value)} parts, at most {MOST_PARTS} are read")
        return value


def lies_within(file: str) -> bool:
    """Whether a name is one of a file in the dataset's own folder; where links lead, foreign.file_within knows."""
    if not file or any(letter in "\\:" or ord(letter) < 32 for letter in file):
        return False
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts
