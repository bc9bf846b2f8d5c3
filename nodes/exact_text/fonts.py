"""Fonts to write with: the one that comes with Pillow, files of models/palimpsest_fonts, and those of the system."""

from __future__ import annotations

import functools
import os
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont, features

from ..files import register_folder
from ..foreign import regular_file
from ..quoting import quoted

FOLDER = "palimpsest_fonts"
KINDS = frozenset({".ttf", ".otf", ".ttc"})
BUILT_IN = "built in: Aileron (Latin letters)"
VIRAMA = 9  # the combining class of signs that join two letters of India's scripts
NO_LETTER = "\U0010ffff"  # no font has it: what it draws in its place is what stands for a missing letter
FONT_FOLDERS = {  # where systems keep their fonts; nothing else of the disk is looked at
    "linux": ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": ("%WINDIR%/Fonts", "%LOCALAPPDATA%/Microsoft/Windows/Fonts"),
}
WAY_OUT = f"choose another font, or put one that has it into models/{FOLDER} (Noto Sans CJK and WenQuanYi have Chinese)"


class FontFolders:
    """models/palimpsest_fonts, and behind it the folders of the system."""

    def register(self) -> None:
        """Tell the host about them."""
        import folder_paths

        register_folder(FOLDER, "fonts", KINDS)
        paths, kinds = folder_paths.folder_names_and_paths[FOLDER]
        more = [path for path in system_folders() if path not in paths]
        folder_paths.folder_names_and_paths[FOLDER] = ([*paths, *more], kinds)


def system_folders() -> list[str]:
    """The system's folders of fonts that are there."""
    listed = FONT_FOLDERS.get(sys.platform, FONT_FOLDERS["linux"])
    return [path for path in map(os.path.expanduser, map(os.path.expandvars, listed)) if os.path.isdir(path)]


def listed() -> list[str]:
    """The names to choose from: the built-in font, then files; none of these where the host knows no folder yet."""
    import folder_paths

    known = FOLDER in folder_paths.folder_names_and_paths
    return [BUILT_IN, *(folder_paths.get_filename_list(FOLDER) if known else [])]


@dataclass(frozen=True)
class Font:
    """A font by its name in the list; path: where its file lies, None for the built-in one."""

    name: str
    path: str | None = None

    @classmethod
    def of(cls, name: str) -> Font:
        """A font of the list. Raises ValueError for a name that is not in it."""
        import folder_paths

        if name == BUILT_IN:
            return cls(name)
        path = folder_paths.get_full_path(FOLDER, name) if name in listed() else None
        if path is None:
            raise ValueError(
                f"there is no font {quoted(name)}: choose one of the list, or put it into models/{FOLDER}."
            )
        return cls(name, path)

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """Its letters with so many pixels to the em. Raises ValueError for a file that is no font."""
        return loaded(self.path, max(1, size))

    def missing(self, text: str) -> list[str]:
        """The letters of a text that it has no picture of."""
        font = self.at(32)
        nothing = bytes(font.getmask(NO_LETTER)), font.getbbox(NO_LETTER)
        return [letter for letter in dict.fromkeys(text) if not letter.isspace() and drawn_alike(font, letter, nothing)]


def drawn_alike(font: ImageFont.FreeTypeFont, letter: str, nothing: tuple) -> bool:
    """Whether a letter is drawn as a missing one is, or not at all."""
    picture = bytes(font.getmask(letter))
    return not any(picture) or (picture, font.getbbox(letter)) == nothing


@functools.lru_cache(64)
def loaded(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    """A font file at one size; of a collection the first."""
    if path is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(str(regular_file(Path(path))), size)
    except OSError as error:
        raise ValueError(f"{os.path.basename(path)} cannot be read as a font ({error}): choose another one.") from error


def require_drawable(font: Font, text: str) -> None:
    """Raise ValueError for letters that the font lacks, and for writing that needs more than one letter at a time."""
    missing = font.missing(text)
    if missing:
        letters = ", ".join(f"{letter!r} (U+{ord(letter):04X})" for letter in missing[:5])
        raise ValueError(f"the font {font.name} has no letter {letters} of the line {quoted(text)}: {WAY_OUT}.")
    joined = [letter for letter in text if is_from_the_right(letter) or is_mark(letter)]
    if joined and not features.check("raqm"):
        raise ValueError(
            f"the line {quoted(text)} has the letter {joined[0]!r}, whose script joins letters or runs from the right: "
            "this Pillow draws it letter by letter, which would be wrong. Install a Pillow with Raqm, or write the "
            "line in another script."
        )


def is_from_the_right(letter: str) -> bool:
    """Whether a letter's script runs from the right; those whose letters join do."""
    return unicodedata.bidirectional(letter) in ("R", "AL")


def is_mark(letter: str) -> bool:
    """Whether a letter is a sign on another one."""
    return unicodedata.category(letter)[0] == "M"


def pieces(text: str) -> list[str]:
    """What of a line can be drawn apart: each letter with the signs on it. Where letters join, all is one piece."""
    if any(is_from_the_right(letter) or unicodedata.combining(letter) == VIRAMA for letter in text):
        return [text]
    found: list[str] = []
    for letter in text:
        if found and is_mark(letter):
            found[-1] += letter
        else:
            found.append(letter)
    return found
