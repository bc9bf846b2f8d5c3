"""The words around an instruction: what a language model is asked, and what is kept of its answer."""

from __future__ import annotations

import re

from ...kernels.scripts import split_lines
from ..quoting import quoted

HERE = "{instruction}"
QUESTION = f"what will this image be like if '{HERE}'"  # Apple's ml-mgie; its model was trained on these words
SHORTEN = "summarize the following paragraph in {words} words:\n\n{text}"  # of its training data
SENTENCES = 2
THOUGHTS = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)
SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[\u3002\uff01\uff1f])")


def asked(question: str, instruction: str) -> str:
    """What the model is asked. Raises ValueError for a question without a place for the instruction."""
    if HERE not in question:
        raise ValueError(f"question is {quoted(question)}, without {HERE}: write {HERE} where the instruction belongs.")
    return question.replace(HERE, " ".join(instruction.split()))


def cleaned(answer: str) -> str:
    """What is kept of an answer, in one line: as Apple's ml-mgie keeps it.

    Behind ASSISTANT:, before </s>, before the first "alternative", before [IMG0]; of that the first two sentences.
    Ours: a thought in <think> goes first, sentences may end in "!", "?" and the signs of Chinese, and one that is
    not ended gets no full stop.
    """
    text = THOUGHTS.sub(" ", answer)
    text = text.partition("ASSISTANT:")[2] or text
    for end in ("</s>", "alternative", "[img0]"):
        text = before(text, end)
    return first_sentences(" ".join(text.split()), SENTENCES)


def before(text: str, end: str) -> str:
    """A text up to some letters, large or small; all of it where they are not there."""
    return re.split(re.escape(end), text, maxsplit=1, flags=re.IGNORECASE)[0]


def ends_of_sentences(text: str) -> list[int]:
    """Where sentences end before others, with what closes them."""
    return [found.end() for found in SENTENCE.finditer(text)]


def first_sentences(text: str, count: int) -> str:
    """The first sentences of a text."""
    ends = ends_of_sentences(text)
    return text[: ends[count - 1]].strip() if len(ends) >= count else text.strip()


def is_longer(text: str, words: int) -> bool:
    """Whether a text has more than so many words; 0: it may have any number."""
    return words > 0 and len(text.split()) > words


def shortened(text: str, words: int) -> str:
    """A text of at most so many words: the sentences that fit, or else the first words."""
    if not is_longer(text, words):
        return text
    fitting = [text[:end].strip() for end in ends_of_sentences(text) if not is_longer(text[:end], words)]
    return fitting[-1] if fitting else " ".join(text.split()[:words])


def lines(text: str) -> list[str]:
    """The lines of a text that say something: one for each picture of a batch, or one for all."""
    return split_lines(text)


def for_each(text: str, count: int, what: str) -> list[str]:
    """A line for each of `count` pictures. Raises ValueError for none, and another number than that or one."""
    found = lines(text)
    if not found:
        raise ValueError(f"{what} is empty: write what is to be changed, such as 'make it winter'.")
    if len(found) not in (1, count):
        raise ValueError(
            f"{what} has {len(found)} lines for {count} pictures: write one line for all of them, or a line for each."
        )
    return found * count if len(found) == 1 else found
