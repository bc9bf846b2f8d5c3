"""What the host wrote into its log while a test ran, and which of it is an error."""

from __future__ import annotations

import re
from pathlib import Path

# A file of the pocket's that the host does not like yet, and what it says of it; only where its workflows run.
KNOWN = {"palimpsest_pocket_unet.safetensors": re.compile("ERROR lora ")}
LOADS_IT = re.compile(r"Multimodal|multimodal")
_read: dict[Path, int] = {}  # how far each log was looked at


def new_lines(log: Path) -> list[str]:
    """The lines of a log since the last look at it."""
    with log.open("rb") as file:
        file.seek(_read.get(log, 0))
        lines = file.read().decode("utf-8", "replace").splitlines()
        _read[log] = file.tell()
    return lines


def errors(lines: list[str], test: str) -> list[str]:
    """Lines with ERROR in them, except those that are known of the files that a test of this id loads."""
    known = KNOWN.values() if LOADS_IT.search(test) else ()
    return [line for line in lines if "ERROR" in line and not any(each.search(line) for each in known)]
