"""Names of files as people write them: sub/folder/name with the date in it, and never outside of their folder."""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

LETTERS, BYTES, PARTS = 80, 200, 4  # 200 leaves room behind the name in the 255 bytes that file systems have for one
CLOCK = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}
FORMS = {"yyyy": "%Y", "yy": "%y", "M": "%m", "d": "%d", "h": "%H", "m": "%M", "s": "%S"}
UNFINISHED = ".unfinished"  # behind the name of what is being written


def dated(prefix: str, now: time.struct_time | None = None) -> str:
    """A name with the time for %year%, %month%, %day%, %hour%, %minute%, %second% and %date:yyyy-MM-dd hh-mm-ss%.

    The first six are the host's own; the last is its editor's, which fills it in for the nodes it knows only. Raises
    ValueError for another word between two percent signs.
    """
    now = now or time.localtime()

    def part(found: re.Match) -> str:
        letters = found[0]
        if letters in FORMS:
            text = time.strftime(FORMS[letters], now)
            return text if letters.startswith("y") else str(int(text))
        return time.strftime(FORMS[letters[0]], now)

    prefix = re.sub(r"%date:([^%]+)%", lambda found: re.sub("yyyy|yy|dd?|MM?|hh?|mm?|ss?", part, found[1]), prefix)
    prefix = re.sub(f"%({'|'.join(CLOCK)})%", lambda found: time.strftime(CLOCK[found[1]], now), prefix)
    other = re.search(r"%\w+%|%[^%/\\]+\.\w+%|%date:%", prefix)
    if other:
        known = ", ".join(f"%{word}%" for word in CLOCK)
        raise ValueError(
            f"the name has {other[0][:60]!r} in it, which stands for nothing here: write {known} or "
            "%date:yyyy-MM-dd%, or leave out the percent signs."
        )
    return prefix


def cleaned(part: str) -> str:
    """One folder or file of a name: letters with their marks, digits, blank, dash, underscore and dot, cut to size."""
    kept = "".join(
        sign for sign in unicodedata.normalize("NFC", part) if sign in "_-. " or unicodedata.category(sign)[0] in "LMN"
    )
    kept = kept.strip(". ")[:LETTERS].encode()[:BYTES].decode(errors="ignore")
    return kept.rstrip(". ")


def safe_name(prefix: str, kind: str, example: str) -> str:
    """A name without what could leave its folder: "folder/name", each at most 80 letters and 200 bytes, dated.

    Raises ValueError for a prefix with no letter or digit in it, for too many folders and an unknown %word%.
    """
    parts = [part for part in map(cleaned, re.split(r"[/\\]", dated(prefix))) if part]
    if not parts or not any(unicodedata.category(sign)[0] in "LN" for sign in parts[-1]):
        raise ValueError(f"{kind} name {prefix[:60]!r} has no letters or digits: write a name such as {example!r}.")
    if len(parts) > PARTS:
        raise ValueError(
            f"{kind} name {prefix[:60]!r} goes {len(parts) - 1} folders deep, the limit is {PARTS - 1}: leave some out."
        )
    return "/".join(parts)


def taken(path: Path) -> bool:
    """Whether anything is there under this name, or is being written."""
    return os.path.lexists(path) or os.path.lexists(unfinished(path))


def unfinished(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(path.name + UNFINISHED)


def first_free(paths: Callable[[int], Iterable[Path]]) -> list[Path]:
    """paths(n) for the first n from 1 on under which none of them is taken."""
    number = 1
    while any(map(taken, found := list(paths(number)))):
        number += 1
    return found


def within(root: Path, name: str) -> Path:
    """root / name. Raises ValueError where a link in the folder leads out of it."""
    path = root / name
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"the folder of {name[:60]!r} lies outside of {root.name} (a link leads there): choose another."
        )
    return path
