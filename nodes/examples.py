"""The pictures of the templates, put where Load Image lists them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from . import writing

PICTURES = Path(__file__).resolve().parent.parent / "workflows" / "pictures"


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
            with contextlib.suppress(FileExistsError), writing.whole(target) as made:
                shutil.copyfile(picture, made)
                came.append(picture.name)
        except OSError as error:
            logging.warning("Palimpsest: the templates' pictures cannot be put into %s: %s", folder, error)
            break
    return came
