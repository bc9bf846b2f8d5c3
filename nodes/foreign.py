"""Files that others wrote or edited: only regular ones inside their folder are opened, and read within budgets.

What is wrong with one is a ValueError that names the file, the fault and the way out.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .host.cancelling import stop_if_cancelled
from .quoting import quoted

MOST_BYTES = 1 << 24  # of a file of JSON that is read whole; published configurations and recipes have some thousand
MOST_DEPTH = 16  # of lists and objects in JSON; configurations need 4
MOST_DIGITS = 100  # of a whole number
MOST_LINE = 1 << 20  # letters of one line; a record of a dataset has some hundred
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


# ---------------------------------------------------------------------------------------------------- which are opened


def regular_file(path: Path) -> Path:
    """Where a regular file lies, with links followed. Raises ValueError for what is missing, or another thing.

    A pipe or a device would hang whoever opens it.
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        found = path.resolve(strict=True)
        kind = found.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle, until Python 3.12
        reason = getattr(error, "strerror", None) or "no such name can be"
        raise ValueError(f"{quoted(name)} cannot be opened ({reason}): put the file there again.") from error
    if not stat.S_ISREG(kind):
        thing = "a folder" if stat.S_ISDIR(kind) else "a pipe or a device"
        raise ValueError(f"{quoted(name)} is {thing}: put a file in its place.")
    return found


def unreadable(path: Path, error: OSError) -> ValueError:
    """What to raise where the disk or its rights keep a file from being read."""
    name = quoted(f"{path.parent.name}/{path.name}")
    return ValueError(f"{name} cannot be read ({error.strerror}): let ComfyUI read it, or put it on a sound disk.")


def file_within(folder: Path, name: str) -> Path:
    """Where a regular file of a folder lies, with links followed, in the folder itself.

    Raises ValueError as regular_file does, and for a link that leads elsewhere.
    """
    found = regular_file(folder / name)
    if not found.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{quoted(f'{folder.name}/{name}')} is a link out of its folder, to {quoted(found.name)}, which is not "
            "followed: put the file itself there."
        )
    return found


# ------------------------------------------------------------------------------------------------------------ the text


def decoding_of(start: bytes) -> dict[str, str]:
    """How a file is decoded that begins so: as its byte order mark says, else as UTF-8.

    Bytes that are no UTF-8 become halves of surrogate pairs, which `readable` refuses at their place.
    """
    encoding = next((encoding for mark, encoding in MARKS if start.startswith(mark)), "utf-8")
    return {"encoding": encoding, "errors": "replace" if encoding == "utf-16" else "surrogateescape"}


def readable(text: str) -> str:
    """The text. Raises ValueError where bytes of it were none: guessing would read other letters in silence."""
    odd = re.search("[\0\ud800-\udfff]", text)  # zeros: UTF-16 without its mark
    if odd is not None:
        near = quoted(text[max(0, odd.start() - 20) : odd.end() + 20])
        raise ValueError(f"it is not in UTF-8 near {near}, save it as UTF-8 in the editor")
    return text


def text_of(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a regular file of at most so many bytes: UTF-8, or what its byte order mark says.

    Raises ValueError for a larger file, and for another encoding.
    """
    with open(regular_file(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes, which nothing of its kind has")
    return readable(content.decode(**decoding_of(content)))


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a regular file, one at a time, as long as the run is not cancelled; encodings as in text_of.

    Lines end where editors end them: U+2028 and its like are letters of a text. Of a line no more than MOST_LINE
    letters are read at once, and one more, by which json_line knows it. Raises ValueError as regular_file, and where
    the disk or its rights keep it from being read.
    """
    where = regular_file(path)
    try:
        with open(where, "rb") as raw, io.TextIOWrapper(raw, **decoding_of(raw.peek(4))) as file:
            while line := file.readline(MOST_LINE + 1):
                stop_if_cancelled()
                yield line
    except OSError as error:
        raise unreadable(path, error) from error


# ------------------------------------------------------------------------------------------------------------ the JSON


def json_of(text: str) -> Any:
    """What a text of JSON says. Raises ValueError for what is none, for NaN, and for more than MOST_DEPTH levels."""
    deep = f"it is nested deeper than {MOST_DEPTH} levels"
    try:
        found = json.loads(text, parse_constant=no_number, parse_int=whole_number)
    except RecursionError:
        raise ValueError(deep) from None
    if deeper_than(found, MOST_DEPTH):
        raise ValueError(deep)
    return found


def whole_number(said: str) -> int:
    """A whole number of JSON. Raises ValueError for one that Python would refuse in words of its own."""
    if len(said) > MOST_DIGITS:
        raise ValueError(f"a number in it has {len(said)} digits")
    return int(said)


def json_line(line: str) -> Any:
    """What one line of lines_of says. Raises ValueError as json_of, and for a line that is too long or no UTF-8."""
    if len(line) > MOST_LINE:
        raise ValueError(f"it has more than {MOST_LINE} letters")
    return json_of(readable(line))


def no_number(said: str) -> None:
    """Refuse what Python reads as JSON and the standard does not know."""
    raise ValueError(f"{said} is no number")


def parts_of(value: Any) -> Any:
    """What lies in a list or an object of JSON."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects of JSON lie in one another more often than that."""
    inner = (each for each in parts_of(value) if isinstance(each, dict | list))
    return levels == 0 or any(deeper_than(each, levels - 1) for each in inner)


def object_of(path: Path, way_out: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError that names the file and ends with the way out, for anything else."""
    where, name = regular_file(path), f"{path.parent.name}/{path.name}"
    try:
        found = json_of(text_of(where))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise ValueError(f"{name} is damaged ({str(error).rstrip('.')}): {way_out}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no object in braces but {quoted(found)}: {way_out}.")
    return found
