"""What the host wrote into its log while a test ran, and which of it is an error."""

from __future__ import annotations

from pathlib import Path

_read: dict[Path, int] = {}  # how far each log was looked at


def new_lines(log: Path) -> list[str]:
    """The lines of a log since the last look at it."""
    with log.open("rb") as file:
        file.seek(_read.get(log, 0))
        lines = file.read().decode("utf-8", "replace").splitlines()
        _read[log] = file.tell()
    return lines


def errors(lines: list[str]) -> list[str]:
    """Lines with ERROR in them."""
    return [line for line in lines if "ERROR" in line]
