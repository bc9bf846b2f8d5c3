"""The pictures of the templates, put where Load Image lists them."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

PICTURES = Path(__file__).resolve().parent.parent / "pictures"


def offer(folder: Path | str) -> list[str]:
    """Copy each picture that a folder lacks into it, whole or not at all; the names of those that came.

    A file of the same name is left as it is. A folder that cannot be written to is told in the log: only the templates'
    pictures are missing then.
    """
    came = []
    for picture in sorted(PICTURES.glob("*.webp")):
        target = Path(folder, picture.name)
        if os.path.lexists(target):
            continue
        try:
            copy_whole(picture, target)
        except OSError as error:
            logging.warning("Palimpsest: the templates' pictures cannot be put into %s: %s", folder, error)
            break
        came.append(picture.name)
    return came


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that its target is whole or not there."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    try:
        shutil.copyfile(source, temporary)
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read it
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
