"""Captions for pictures that a LoRA is to learn: where each comes from, and what of it is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...kernels.captions import Vocabulary, reduce, with_trigger
from ...kernels.scripts import split_lines, split_list
from .. import plots
from ..settings import Settings
from .beside import NO_FOLDER, captions_beside

GIVEN, BESIDE, SEEN, NOWHERE = "given", "from files", "described by a model", "without a caption"
QUESTION = "Describe in one short sentence what is in this picture, and not how it is made."
SHOWN = 40  # pictures on the sheet
NAMED = 8  # words that the report names


@dataclass(frozen=True)
class CaptionSettings(Settings):
    """See PalimpsestCaptionHelper for what each does."""

    folder: str = NO_FOLDER
    drop_style: bool = True
    drop_words: str = ""
    keep_words: str = ""
    trigger: str = ""
    question: str = QUESTION
    max_tokens: int = 60

    def vocabulary(self) -> Vocabulary:
        """What is left out of captions."""
        return Vocabulary(comma_separated(self.drop_words), comma_separated(self.keep_words))


@dataclass(frozen=True)
class Caption:
    """A picture's caption as it goes out, where it came from, the picture's name, and what was left out of it."""

    text: str
    source: str
    name: str
    dropped: list[str] = field(default_factory=list)


def comma_separated(text: str) -> frozenset[str]:
    """Words and phrases between commas, in small letters."""
    return frozenset(" ".join(each.lower().split()) for each in split_list(text))


def given_for(count: int, captions: Sequence[str]) -> list[str]:
    """What was typed or linked for each of `count` pictures, empty where nothing was.

    Takes a list of as many, the lines of one text, or one line for all. Raises ValueError for another number.
    """
    texts = list(captions)
    if len(texts) == 1 and count != 1:
        texts = split_lines(texts[0]) or [""]
    if len(texts) == 1:
        texts = texts * count
    if len(texts) != count:
        raise ValueError(
            f"captions has {len(texts)} texts for {count} pictures: give one for each in their order, one line for "
            "all, or none and the folder."
        )
    return [" ".join(text.split()) for text in texts]


def captions_for(
    pictures: Sequence[Tensor],
    captions: Sequence[str],
    settings: CaptionSettings,
    describe: Callable[[Tensor], str] | None = None,
) -> list[Caption]:
    """A caption for each picture (1, H, W, 3): the one given, else the file's beside it, else what `describe` says.

    Raises ValueError for a number of captions or of files that is not the pictures'.
    """
    count, vocabulary = len(pictures), settings.vocabulary()
    given, beside = given_for(count, captions), [("", "")] * count
    if settings.folder != NO_FOLDER:
        beside = list(captions_beside(settings.folder, count))
    found = []
    for number, (text, (name, written)) in enumerate(zip(given, beside, strict=True)):
        whole, source = next(((t, s) for t, s in ((text, GIVEN), (written, BESIDE)) if t), ("", NOWHERE))
        if not whole and describe is not None:
            whole, source = describe(pictures[number]), SEEN
        kept = reduce(whole, vocabulary) if settings.drop_style else None
        reduced, dropped = (kept.text, kept.dropped) if kept else (whole, [])
        found.append(Caption(with_trigger(reduced, settings.trigger), source, name or f"picture {number + 1}", dropped))
    return found


def described(captions: Sequence[Caption]) -> str:
    """Where the captions come from and what was left out, in a line."""
    sources = Counter(caption.source for caption in captions)
    parts = [f"{len(captions)} pictures"] + [f"{number} {source}" for source, number in sources.items()]
    dropped = Counter(word.lower() for caption in captions for word in caption.dropped)
    if dropped:
        most = ", ".join(f"{word} ({number})" for word, number in dropped.most_common(NAMED))
        changed = sum(bool(caption.dropped) for caption in captions)
        parts.append(f"left out of {changed}: {most}" + (" and more" if len(dropped) > NAMED else ""))
    if len(captions) > SHOWN:
        parts.append(f"the sheet shows the first {SHOWN}")
    return "; ".join(parts)


def sheet(pictures: Iterable[Tensor], captions: Sequence[Caption]) -> Tensor:
    """IMAGE (1, H, W, 3): each picture with its caption below, and what was left out in brackets."""
    rows = (
        plots.Row(
            [(picture[0], caption.name)],
            (caption.text or NOWHERE) + (f"  [left out: {'; '.join(caption.dropped)}]" if caption.dropped else ""),
        )
        for picture, caption in zip(pictures, captions[:SHOWN], strict=False)
    )
    return plots.sheet(rows, columns=3)
