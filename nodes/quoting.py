"""How errors quote what they were given."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

MOST_LETTERS = 60  # of a value in an error: enough to find it again, too few to fill the screen with a pasted file


class Brief(Repr):
    """repr of anything, however deep or long, without making all of it first."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 2 * MOST_LETTERS, 2 * MOST_LETTERS

    def repr_int(self, x: int, level: int) -> str:
        """A number; Python writes none out that has more than some thousand digits."""
        return repr(x) if x.bit_length() <= 1024 else f"<a number of {x.bit_length()} bits>"


def quoted(value: Any) -> str:
    """A value as an error quotes it: at most its first 60 letters, then dots; text in quotation marks.

    What cannot be printed as it is stands there escaped (line ends, control characters, halves of surrogate pairs).
    """
    if isinstance(value, str):
        return repr(value[:MOST_LETTERS]) + ("..." if len(value) > MOST_LETTERS else "")
    text = Brief().repr(value)
    return text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + "..."
