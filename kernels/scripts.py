"""Scripts of the world, as far as lists and captions need them: commas, and letters that stand without blanks."""

from __future__ import annotations

import re

COMMAS = ",\uff0c\u3001\uff64\u060c"  # full-width, ideographic, half-width ideographic, Arabic
# Thai, Lao, Myanmar, Khmer, kana, Bopomofo, Chinese characters: a word's letters stand beside the next word's
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3105-\u312f\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af]"
)
LINES = re.compile(r"\r\n|\r|\n")
ENDS = re.compile(f"[{COMMAS}\n]")


def split_list(text: str) -> list[str]:
    """The entries of a list as people write it: between commas of any script and ends of lines, none of them empty."""
    return [entry for entry in (part.strip() for part in ENDS.split(text)) if entry]


def split_lines(text: str) -> list[str]:
    """The lines of a text that are not empty, as editors end them: U+2028 and its like are blanks of a text.

    Without byte order marks, and blanks at their ends.
    """
    return [line for line in (part.strip() for part in LINES.split(text.replace("\ufeff", ""))) if line]
