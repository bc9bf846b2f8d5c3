"""Express Instruction: a language model looks at a picture and says what the edit means (MGIE, arXiv:2309.17102)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .. import host
from ..settings import Settings
from .edit_head import EditHead, Reading
from .wording import QUESTION, SHORTEN, asked, cleaned, for_each, is_longer, shortened
from .writers import EncoderWriter, HostWriter, MgieWriter, Writer, Written

WINTER = "make it winter"
SOURCES = {"clip": HostWriter, "multimodal_encoder": EncoderWriter, "mgie": MgieWriter}


@dataclass(frozen=True)
class ExpressSettings(Settings):
    """What is asked, and how long an answer may be; see PalimpsestExpressInstruction for each."""

    instruction: str = WINTER
    summary_words: int = 32
    max_tokens: int = 96
    question: str = QUESTION


@dataclass(frozen=True, eq=False)
class Expressed:
    """The text for each picture, what a report says of it, and the head with what it is to read."""

    texts: tuple[str, ...]
    report: str
    head: EditHead | None

    @property
    def text(self) -> str:
        """A line for each picture."""
        return "\n".join(self.texts)


def writer_of(models: dict[str, Any]) -> Writer:
    """The language model that is connected. Raises ValueError where it is none, or more than one."""
    there = [name for name, model in models.items() if model is not None]
    if len(there) != 1:
        what = "no language model is connected" if not there else f"{' and '.join(there)} are connected"
        raise ValueError(
            f"{what}, one writes: connect clip (Load CLIP with a model that generates), multimodal_encoder (Load "
            "Multimodal Encoder) or mgie (Load MGIE)."
        )
    return SOURCES[there[0]](models[there[0]])


def express(
    pictures: Tensor, writer: Writer, settings: ExpressSettings, head: EditHead | None = None, node: Any = None
) -> Expressed:
    """A text for each of some pictures (B, H, W, 3 or 4), one by one.

    head: MGIE's, which is given back with its readings. Raises ValueError for an answer of which nothing is left.
    """
    instructions = for_each(settings.instruction, len(pictures), "instruction")
    questions = [asked(settings.question, each) for each in instructions]
    progress = Progress(node, len(pictures), settings.max_tokens)
    texts, told, readings = [], [], []
    for number, (picture, question) in enumerate(zip(pictures, questions, strict=True), 1):
        host.stop_if_cancelled()
        written = writer.write(picture, question, settings.max_tokens, progress.of(number))
        text, lines = kept(writer, written, settings, progress.of(number))
        texts.append(text)
        told.append("\n".join([f"picture {number} of {len(pictures)}, by {writer.name}", *lines]))
        readings += [] if written.reading is None else [replace(written.reading, text=text)]
    given = None if head is None else head.reading(tuple(readings))
    return Expressed(tuple(texts), "\n\n".join(told), given)


def kept(writer: Writer, written: Written, settings: ExpressSettings, heard: Callable) -> tuple[str, list[str]]:
    """(text, what a report says of it) of an answer: cleaned, and summarised where it is long and that is wanted."""
    text = cleaned(written.text)
    if not text:
        raise ValueError(
            f"{writer.name} answered {written.text.strip()[:200]!r}, of which nothing is left that says how the "
            "picture should be: ask in other words, raise max_tokens, or take another model."
        )
    lines = [f"sent: {written.sent}", f"answered{counted(written)}: {written.text.strip()}"]
    lines += [written.note] if written.note else []
    if writer.shortens and is_longer(text, settings.summary_words):
        request = SHORTEN.format(words=settings.summary_words, text=text)
        summary = writer.write(None, request, settings.max_tokens, heard)
        lines += [f"sent: {summary.sent}", f"answered{counted(summary)}: {summary.text.strip()}"]
        text = shortened(cleaned(summary.text) or text, settings.summary_words)
    return text, [*lines, f"expressed: {text}"]


def counted(written: Written) -> str:
    """The number of an answer's tokens, where it is known."""
    return "" if written.tokens is None else f" ({written.tokens} tokens)"


class Progress:
    """What people see while a model writes: a bar that goes by tokens, and the text so far."""

    def __init__(self, node: Any, pictures: int, most: int):
        import comfy.utils

        self.pictures, self.most = pictures, most
        self.bar, self.text = comfy.utils.ProgressBar(pictures * most), host.ProgressText(node)

    def of(self, number: int) -> Callable[[str, int], None]:
        """What hears of the tokens of one picture."""

        def heard(text: str, tokens: int) -> None:
            self.bar.update_absolute(min((number - 1) * self.most + tokens, self.pictures * self.most))
            self.text.update(f"picture {number} of {self.pictures}, {tokens} of at most {self.most} tokens: {text}")

        return heard


def readings_of(head: EditHead, count: int) -> tuple[Reading, ...]:
    """A reading for each of `count` texts. Raises ValueError where there are none, or neither so many nor one."""
    found = head.readings
    if not found:
        raise ValueError(
            f"{head.name} has read no picture: connect its edit_head through Express Instruction (mgie), which gives "
            "it on."
        )
    if count != len(found) and 1 not in (count, len(found)):
        raise ValueError(
            f"the text has {count} lines, edit_head has read {len(found)} pictures: write one line, or one for each."
        )
    return found if len(found) >= count else found * count
