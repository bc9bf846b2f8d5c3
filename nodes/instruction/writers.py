"""Language models that look at a picture and write: a host's CLIP, a multimodal encoder, MGIE's own."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..host.cancelling import Cancellable
from ..multimodal import MultimodalEncoder, answer, language_head
from ..quoting import quoted
from .edit_head import EditHead, Reading

Heard = Callable[[str, int], None]  # the text so far, and its tokens
LONGEST_RUN = 16  # of one token in a text
WRITE_AND_SEE = "Qwen3-VL, Qwen3.5, Gemma 3 or Gemma 4 by Load CLIP"


@dataclass(frozen=True)
class Written:
    """A model's answer. sent: the text that it was given; tokens: None where the route does not tell; note: what else
    is to be said of it; reading: what an edit head may read."""

    text: str
    sent: str
    tokens: int | None = None
    note: str = ""
    reading: Reading | None = None


class Writer(Protocol):
    """A language model that answers questions about a picture."""

    name: str
    shortens: bool  # whether it is asked for a summary of a long answer

    def write(self, picture: Tensor | None, question: str, most: int, heard: Heard) -> Written:
        """The answer to a question about a picture (H, W, 3) in 0..1, or about nothing but the text."""


@dataclass(frozen=True, eq=False)
class HostWriter:
    """A text encoder of the host that generates, by its tokenize, generate and decode."""

    clip: Any
    name: str = "the language model at clip"
    shortens: bool = True

    def write(self, picture: Tensor | None, question: str, most: int, heard: Heard) -> Written:
        if not all(hasattr(self.clip, method) for method in ("tokenize", "generate", "decode")):
            raise ValueError(f"clip is {type(self.clip).__name__} and writes no text: connect {WRITE_AND_SEE}.")
        with Cancellable():
            tokens = self.clip.tokenize(question, skip_template=False, min_length=1, thinking=False, **shown(picture))
            if picture is not None and not sees(tokens):
                raise ValueError(
                    "the language model did not see the picture: its tokens hold no entry of type image, so its answer "
                    "would be about any picture. Text encoders of SD and FLUX, and Qwen2.5-VL by Load CLIP, take none "
                    f"this way: connect {WRITE_AND_SEE}, or Load Multimodal Encoder."
                )
            limits = {"do_sample": False, "max_length": most, "temperature": 1.0, "seed": 0}
            ids = self.clip.generate(tokens, **taken(self.clip.generate, limits))
            sent = sent_text(self.clip, tokens, question)
            return Written(str(self.clip.decode(ids)), sent, len(ids) if hasattr(ids, "__len__") else None)


def shown(picture: Tensor | None) -> dict[str, Tensor]:
    """How a host's tokenizer is given a picture, as Generate Text gives it."""
    return {} if picture is None else {"image": picture[None, ..., :3]}


def sees(tokens: Any) -> bool:
    """Whether there is a picture among a host's tokens."""
    return any(isinstance(token, dict) and token.get("type") == "image" for token in entries(tokens))


def entries(tokens: Any) -> Iterator[Any]:
    """The tokens in lists of lists of (token, weight, ...), by the text encoders' names."""
    if isinstance(tokens, dict) and "type" not in tokens:
        tokens = list(tokens.values())
    if isinstance(tokens, list):
        for each in tokens:
            yield from entries(each)
    elif isinstance(tokens, tuple) and tokens:
        yield tokens[0]
    else:
        yield tokens


def sent_text(clip: Any, tokens: Any, question: str) -> str:
    """The text that a host's tokens are, with <picture> for a picture: the question in its template.

    The question alone where what they decode to does not hold it.
    """
    parts = []
    for are_numbers, group in itertools.groupby(entries(tokens), lambda token: isinstance(token, int)):
        if are_numbers:
            parts.append(str(clip.decode(unpadded(group), **taken(clip.decode, {"skip_special_tokens": False}))))
        else:
            parts += ["<picture>" for token in group if isinstance(token, dict)]
    text = "".join(parts).strip()
    return text if " ".join(question.split()) in " ".join(text.split()) else question


def unpadded(ids: Iterable[int]) -> list[int]:
    """Tokens without the host's padding: runs of one token, longer than any in a text."""
    runs = [list(run) for _, run in itertools.groupby(ids)]
    return [token for run in runs if len(run) <= LONGEST_RUN for token in run]


def taken(method: Callable, values: dict[str, Any]) -> dict[str, Any]:
    """Those of some values that a method of the host takes, which were fewer in its earlier versions."""
    parameters = inspect.signature(method).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return values
    return {name: value for name, value in values.items() if name in parameters}


class EncoderWriter:
    """The vision-language model of a multimodal encoder, with its language head."""

    shortens = True

    def __init__(self, encoder: MultimodalEncoder):
        if not isinstance(encoder, MultimodalEncoder):
            raise ValueError(f"multimodal_encoder is {quoted(encoder)}: connect Load Multimodal Encoder.")
        self.vlm, self.name = encoder.vlm, encoder.vlm.name
        self.head = language_head(self.vlm)

    def write(self, picture: Tensor | None, question: str, most: int, heard: Heard) -> Written:
        shown = None if picture is None else picture[..., :3]
        found = answer(self.vlm, self.head, shown, question, most=most, heard=heard)
        return Written(found.text, found.sent, found.tokens)


class MgieWriter:
    """MGIE's language model, whose states an edit head reads."""

    shortens = False  # its answers are as short as the summaries that it was trained on

    def __init__(self, head: EditHead):
        if not isinstance(head, EditHead) or head.model is None:
            raise ValueError("mgie holds no language model: connect Load MGIE.")
        self.model, self.name, self.network = head.model, head.name, head.network

    def write(self, picture: Tensor | None, question: str, most: int, heard: Heard) -> Written:
        model = self.model.loaded()
        height, width, _ = picture.shape
        reading, text, tokens, said = model.write(picture, question, most, heard)
        notes = (
            []
            if said or self.network is None
            else ["it did not say [IMG0]: the edit head reads the eight states before its end"]
        )
        if height != width:
            notes.append(f"it saw the square in the middle of {width} x {height} pixels")
        return Written(text, reading.prompt, tokens, "; ".join(notes), reading)
