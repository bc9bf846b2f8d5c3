"""Captions in files beside their pictures, in the order in which the host lists a folder's pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .. import foreign
from ..quoting import quoted

NO_FOLDER = "(none)"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
ENDINGS = (".txt", ".caption")  # the host's and most programs', kohya's
MOST_BYTES = 1 << 16  # of a caption; a long one has some thousand letters
MOST_PICTURES = 10000


def folders() -> list[str]:
    """Folders of ComfyUI's input folder, after "(none)", as the host's own loader lists them."""
    import folder_paths

    try:
        return [NO_FOLDER, *folder_paths.get_input_subfolders()]
    except OSError:
        return [NO_FOLDER]


def pictures_of(folder: Path) -> list[Path]:
    """The pictures that Load Image-Text (from Folder) loads of a folder, in its order, repeats and all.

    A folder within, named 5_cats as kohya's are, counts its pictures five times.
    """
    found: list[Path] = []
    for name in os.listdir(folder):
        path = folder / name
        if is_picture(name):
            found.append(path)
        elif path.is_dir():
            times = name.split("_")[0]
            inside = [path / each for each in os.listdir(path) if is_picture(each)]
            found += inside * min(int(times) if times.isdecimal() and len(times) < 6 else 1, MOST_PICTURES)
        if len(found) > MOST_PICTURES:
            raise ValueError(
                f"{quoted(folder.name)} has more than {MOST_PICTURES} pictures, counted with their repeats: a "
                "LoRA takes 10 to 40, choose a smaller folder."
            )
    return found


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def caption_beside(picture: Path) -> str:
    """The caption in the .txt or .caption file of a picture's name; empty where there is none.

    Raises ValueError for a file that holds no text, or more than a caption.
    """
    for ending in ENDINGS:
        file = picture.with_suffix(ending)
        if file.is_file():
            try:
                inside = foreign.file_within(file.parent, file.name)
                return " ".join(foreign.text_of(inside, MOST_BYTES).split())
            except OSError as error:
                raise foreign.unreadable(file, error) from error
            except ValueError as error:
                raise ValueError(f"the caption {quoted(file.name)} cannot be read: {error}") from error
    return ""


def captions_beside(name: str, count: int) -> Iterator[tuple[str, str]]:
    """(name, caption) of the `count` pictures of a folder of ComfyUI's input folder.

    Raises ValueError where the folder is gone, or has another number of pictures.
    """
    import folder_paths

    folder = Path(folder_paths.get_input_directory(), name)
    if name not in folders() or not folder.is_dir():
        raise ValueError(f"there is no folder {quoted(name)} in ComfyUI's input folder: press R and choose it again.")
    found = pictures_of(folder)
    if len(found) != count:
        raise ValueError(
            f"the folder {quoted(name)} has {len(found)} pictures and images {count}: choose the folder that the "
            "images come from, or (none)."
        )
    for picture in found:
        yield picture.name, caption_beside(picture)
