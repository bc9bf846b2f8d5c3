"""What a person asks for: words, phrases, occurrences and patterns, found among the words of a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable

from ...kernels.scripts import split_list
from ..quoting import MOST_LETTERS, quoted
from .reading import EMBEDDING, Word

STOP = """
a an the this that these those some any each every my your his her its our their it he she they i you we
of in on at by to from with without for as into onto over under above below near behind between through
and or but nor so than then there is are was were be been being has have had do does did not no very s t
"""
STOP_WORDS = frozenset(STOP.split())
NUMBERED = re.compile(r"(.*?)\s*#\s*(\d+)", re.DOTALL)
EVERY_CONTENT_WORD = "*"
NAMED = 40  # words of a prompt that an error names


def choose(words: list[Word], asked: str, read: Callable[[str], list[Word]]) -> dict[str, tuple[Word, ...]]:
    """The words that each entry of a comma-separated list names, by the entry, punctuation within phrases included.

    An entry is a word, a phrase, embedding:name or an embedding's bare name; `cat#2` is its second occurrence in the
    prompt, without a number all of them are meant. In an entry, * stands for any letters (`paint*`), and alone between
    words for one word (`red *`). A lone * is every word but stop words and punctuation, each by itself. Case and
    punctuation do not count. read: the words of a text by the same text encoder.
    Raises ValueError for an entry that is not in the prompt, and for an empty list.
    """
    entries = split_list(asked)
    spoken = [word for word in words if word.spoken]
    if EVERY_CONTENT_WORD in entries:
        at = entries.index(EVERY_CONTENT_WORD)
        content = [word.text for word in spoken if word.text.strip("'").lower() not in STOP_WORDS]
        entries[at : at + 1] = content
    if not entries:
        raise ValueError(
            f"words is {quoted(asked)} and chooses nothing: write one or more of the prompt's words, separated by "
            f"commas, or * for all. {listed(spoken)}"
        )
    return {entry: named_by(entry, words, spoken, read) for entry in dict.fromkeys(entries)}


def named_by(entry: str, words: list[Word], spoken: list[Word], read: Callable) -> tuple[Word, ...]:
    """The words of one entry."""
    numbered = NUMBERED.fullmatch(entry)
    phrase, number = (numbered.group(1), int(numbered.group(2))) if numbered else (entry, None)
    found = occurrences(patterns_of(phrase, spoken, read), spoken)
    if not found:
        raise ValueError(f"{quoted(phrase)} is not in the prompt. {listed(spoken)}")
    if number is not None and not 1 <= number <= len(found):
        times = "once" if len(found) == 1 else f"{len(found)} times"
        raise ValueError(
            f"{quoted(entry)} asks for occurrence {number}, but {quoted(phrase)} is in the prompt {times}."
        )
    chosen = found if number is None else [found[number - 1]]
    spans = [(words.index(run[0]), words.index(run[-1])) for run in chosen]
    return tuple(word for i, word in enumerate(words) if any(first <= i <= last for first, last in spans))


def occurrences(patterns: list[re.Pattern], spoken: list[Word]) -> list[list[Word]]:
    """Runs of words that match patterns, one by one; none for no pattern."""
    count = len(patterns)
    runs = [spoken[first : first + count] for first in range(len(spoken) - count + 1 if patterns else 0)]
    return [run for run in runs if all(p.fullmatch(word.text) for p, word in zip(patterns, run, strict=True))]


def patterns_of(phrase: str, spoken: list[Word], read: Callable[[str], list[Word]]) -> list[re.Pattern]:
    """One pattern for each word of a phrase."""
    names = {word.embedding.casefold(): word.text for word in spoken if word.embedding is not None}
    if phrase.casefold() in names:
        return [re.compile(re.escape(names[phrase.casefold()]))]
    texts: list[str] = []
    for part in phrase.split():
        if "*" in part or part.casefold().startswith(EMBEDDING):
            texts.append(part.lower())
        else:
            texts += [word.text for word in read(part.replace("(", r"\(").replace(")", r"\)")) if word.spoken]
    return [re.compile(".*".join(map(re.escape, text.split("*"))), re.IGNORECASE | re.DOTALL) for text in texts]


def listed(spoken: list[Word]) -> str:
    """A sentence that names the prompt's words."""
    texts = list(dict.fromkeys(word.text for word in spoken))
    more = f", and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    named = ", ".join(text[:MOST_LETTERS] for text in texts[:NAMED])
    return f"Its words are: {named}{more}." if texts else "The prompt has no words."
