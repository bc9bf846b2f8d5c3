"""Words in captions, also of scripts that put no blanks between words: where they stand, and how lists are written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ....kernels.scripts import COMMAS, UNSPACED, split_lines
from ...quoting import quoted

PUNCTUATION = " .,;:!?\u3000\u3001\u3002\uff01\uff0c\uff0e\uff1a\uff1b\uff1f"  # around a phrase


def comma(text: str) -> tuple[str, ...]:
    """Words between commas of any script."""
    return tuple(word for word in (part.strip() for part in re.split(f"[{COMMAS}]", cleaned(text))) if word)


def lines(text: str) -> list[str]:
    """The lines of a text that are not empty, without blanks at their ends."""
    return split_lines(cleaned(text))


def cleaned(text: str) -> str:
    """A text without byte order marks, its accents one with their letters, so that equal words are equal."""
    return unicodedata.normalize("NFC", text.replace("\ufeff", ""))


def joined(left: str, right: str) -> bool:
    """Whether two letters side by side belong to one word: both letters or digits, of scripts with blanks."""
    if unicodedata.combining(right) or unicodedata.category(right) == "Mn":  # an accent or vowel of the one before
        return True
    wordy = all(letter.isalnum() or letter == "_" for letter in (left, right))
    return wordy and not (UNSPACED.match(left) or UNSPACED.match(right))


def is_whole(caption: str, start: int, end: int) -> bool:
    """Whether characters start..end of a caption begin and end where words do."""
    begins = start == 0 or not joined(caption[start - 1], caption[start])
    return begins and (end == len(caption) or not joined(caption[end - 1], caption[end]))


def spots_of(word: str, caption: str) -> list[tuple[int, int]]:
    """Where a word or phrase stands in a caption, whole, in any case and with any blanks: (start, end) each."""
    if not word.strip():
        return []
    pattern = re.compile("(?=(" + r"\s+".join(map(re.escape, word.split())) + "))", re.IGNORECASE)
    return [found.span(1) for found in pattern.finditer(caption) if is_whole(caption, *found.span(1))]


def positions_of(words: Sequence[str], caption: str) -> list[tuple[int, int]]:
    """Where words or phrases stand in a caption (start, end), one after the other where one comes twice.

    Raises ValueError for one that is not there.
    """
    found: list[tuple[int, int]] = []
    for word in words:
        spots = spots_of(word, caption)
        free = [spot for spot in spots if spot not in found]
        if not free:
            raise ValueError(
                f"the word {quoted(word)} is not in the caption {quoted(caption)}"
                f"{' that often' if spots else ''}: write words as the caption has them, separated by commas."
            )
        found.append(free[0])
    return found


def moved(word: str, caption: str, taken: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Where the word of a crop stands in a caption that was edited. Raises ValueError unless that is one free place."""
    free = [spot for spot in spots_of(word, caption) if spot not in taken]
    if len(free) != 1:
        there = "stands there more than once" if free else "is not in it any more"
        raise ValueError(
            f"the caption was edited, and {quoted(word)}, the word of a crop, {there}: give the crop the word, start "
            "and end that it has now, or take the crop out"
        )
    return free[0]


def is_person(phrase: str, people: Sequence[str]) -> bool:
    """Whether a phrase is about a person: one of its words is among `people`; of unspaced scripts, a part of it is."""
    if not set(re.findall(r"[\w'-]+", phrase.lower())).isdisjoint(people):
        return True
    return any(UNSPACED.search(person) and spots_of(person, phrase) for person in people)
