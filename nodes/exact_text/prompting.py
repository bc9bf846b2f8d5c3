"""Text Prompt: a prompt whose quoted lines are, for the text encoder, tokens of their look."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quoting import quoted
from .lines import TextEmbedder, TextLines

STAR = "*"  # AnyText's placeholder, one token of CLIP's vocabulary where spaces stand around it
QUOTES = re.compile('["\u201c\u201d\u201e]')  # straight, and the curly ones that editors put in their place
ENCODER = "l"  # CLIP ViT-L, the text encoder of SD 1.x: AnyText's
LEFT = {"g"}  # encoders beside it that keep the plain placeholder


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt as it was encoded: with placeholders, the line of each, their weights, and encoders that were left."""

    conditioning: list
    prompt: str
    texts: list[str]
    weights: list[float]
    left: list[str]


# ---- the text -------------------------------------------------------------------------------------------------------


def split(prompt: str) -> tuple[str, list[str]]:
    """A prompt with ` * ` for each line in double quotes, and these lines. Raises ValueError for an open quote."""
    pieces = QUOTES.split(prompt)
    if len(pieces) % 2 == 0:
        raise ValueError(
            f"the prompt has {len(pieces) - 1} double quotes, one of them opens a line that nothing closes: put each "
            f"line of text between two, near {quoted(pieces[-1][:40])}."
        )
    if STAR in "".join(pieces[::2]):
        raise ValueError(
            f"the prompt has a {STAR} outside of quotes, which is what lines of text become: write it in words."
        )
    lines = [tidy(piece) for piece in pieces[1::2]]
    spoken = [f" {STAR} " if index % 2 else piece for index, piece in enumerate(pieces)]
    return "".join(spoken), lines


def require_quotable(lines: Sequence[str]) -> None:
    """Raise ValueError for a line with a double quote in it, which a prompt cannot name."""
    for line in lines:
        if QUOTES.search(line):
            raise ValueError(
                f"the line {quoted(line)} has a double quote in it, which is how the prompt marks where a line begins "
                "and ends: write single quotes in Text Lines."
            )


def tidy(text: str) -> str:
    """Composed letters and single spaces, as Text Lines writes them."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def matched(said: Sequence[str], lines: Sequence[str]) -> list[int]:
    """For each quoted line of a prompt the number of the drawn line that it is; equal ones go by their order.

    Raises ValueError where the prompt and Text Lines do not name the same lines.
    """
    lacking, more = Counter(lines) - Counter(said), Counter(said) - Counter(lines)
    if lacking or more:
        parts = [
            f"{what} {', '.join(map(quoted, counted.elements()))}"
            for what, counted in (("lacks", lacking), ("has, and Text Lines does not draw,", more))
            if counted
        ]
        raise ValueError(
            f"the prompt {' and '.join(parts)}: put every line of Text Lines in double quotes, once, letter for "
            'letter, like: a sign that says "OPEN".'
        )
    waiting = {text: [number for number, line in enumerate(lines) if line == text] for text in set(lines)}
    return [waiting[text].pop(0) for text in said]


# ---- the tokens -----------------------------------------------------------------------------------------------------


def encoders(clip: Any, tokens: dict[str, list], embedder: TextEmbedder) -> list[str]:
    """The encoders that keep plain placeholders. Raises ValueError for a CLIP that has no place for the embeddings."""
    if ENCODER not in tokens or set(tokens) - {ENCODER} - LEFT:
        raise ValueError(
            f"this text encoder reads the prompt with {', '.join(sorted(tokens))}; lines of text are told to CLIP "
            "ViT-L, as SD 1.5 has it: load a checkpoint of that family."
        )
    width = getattr(clip.cond_stage_model, f"clip_{ENCODER}").transformer.get_input_embeddings().weight.shape[1]
    if width != embedder.width:
        raise ValueError(
            f"text_embedder makes tokens of {embedder.width} numbers, this text encoder's have {width}: connect the "
            "CLIP that the text embedder was trained with (SD 1.5's)."
        )
    return sorted(set(tokens) & LEFT)


def star_id(clip: Any) -> int:
    """The number of the placeholder's token. Raises ValueError where it is none by itself."""
    found = clip.tokenize(STAR, return_word_ids=True)[ENCODER][0]
    tokens = [token for token, _, group in found if group != 0]
    if len(tokens) != 1:
        raise ValueError(f"this tokenizer writes {STAR} as {len(tokens)} tokens: use a CLIP of SD 1.5.")
    return tokens[0]


def places_of(tokens: list, star: int) -> Iterator[tuple[int, int]]:
    """(chunk, place) of every placeholder."""
    for chunk, row in enumerate(tokens):
        yield from ((chunk, place) for place, entry in enumerate(row) if is_token(entry[0], star))


def is_token(entry: Any, star: int) -> bool:
    """Whether an entry is that token; embeddings of a prompt are tensors."""
    return not isinstance(entry, Tensor) and entry == star


def with_embeddings(tokens: list, where: Sequence[tuple[int, int]], embeddings: Tensor) -> list:
    """Tokens in which placeholders are embeddings (L, D), with the placeholders' weights."""
    made = [list(row) for row in tokens]
    for (chunk, place), embedding in zip(where, embeddings, strict=True):
        made[chunk][place] = (embedding, *made[chunk][place][1:])
    return made


def encode(clip: Any, text: str, lines: TextLines, embedder: TextEmbedder) -> Encoded:
    """The prompt's CONDITIONING. Raises ValueError where prompt, lines, embedder and text encoder do not fit."""
    drawn = [line.text for line in lines.lines]
    require_quotable(drawn)
    prompt, said = split(text)
    order = matched(said, drawn)
    tokens = clip.tokenize(prompt)
    left = encoders(clip, tokens, embedder)
    where = list(places_of(tokens[ENCODER], star_id(clip)))
    if len(where) != len(said):
        raise ValueError(
            f"the text encoder reads {len(where)} {STAR} where the prompt has {len(said)} lines in quotes: put spaces "
            "around the quotes, and none of them into the name of an embedding."
        )
    embeddings = embedder.embed(lines.strips[torch.tensor(order)]).cpu()
    weights = [tokens[ENCODER][chunk][place][1] for chunk, place in where]
    placed = {**tokens, ENCODER: with_embeddings(tokens[ENCODER], where, embeddings)}
    return Encoded(clip.encode_from_tokens_scheduled(placed), prompt, said, weights, left)


def report(found: Encoded) -> str:
    """What the text encoder was told."""
    lines = ", ".join(
        f"{text!r}{'' if weight == 1 else f' (weight {weight:g})'}"
        for text, weight in zip(found.texts, found.weights, strict=True)
    )
    left = "".join(f"; the text encoder {name} reads a plain {STAR}, it was trained with none" for name in found.left)
    return f"{' '.join(found.prompt.split())!r} with {lines} in the place of {STAR}{left}."
