"""A prompt as the text encoder reads it: its words, the pieces of each, and which rows of the CONDITIONING they are."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WORD_END = "</w>"  # closes the last piece of a word in CLIP's vocabulary
EMBEDDING = "embedding:"
EMBEDDING_NAME = re.compile(re.escape(EMBEDDING) + r"((?:\\.|[^\s,:()<>\[\]\\])+)")
# Text encoders whose tokens a U-Net's cross-attention looks at one by one, by the names the host gives them.
SERVED = ({"l"}, {"h"}, {"g"}, {"l", "g"})


@dataclass(frozen=True)
class Word:
    """One word, number, run of punctuation or embedding of a prompt, with its pieces and their positions.

    group: the run of text or the embedding that the host tokenised in one go; no word spans two.
    """

    pieces: tuple[str, ...]
    positions: tuple[int, ...]
    group: int
    embedding: str | None = None

    @property
    def text(self) -> str:
        """As the text encoder reads it: in small letters; embedding:name for an embedding."""
        return EMBEDDING + self.embedding if self.embedding is not None else decoded(self.pieces)

    @property
    def complete(self) -> bool:
        """Whether its last piece ends a word."""
        return self.pieces[-1].endswith(WORD_END)

    @property
    def spoken(self) -> bool:
        """Whether it is more than punctuation."""
        kinds = {unicodedata.category(letter) for letter in self.text}
        return self.embedding is not None or any(kind[0] not in "PZC" and kind not in ("Sm", "Sk") for kind in kinds)

    def with_piece(self, piece: str, position: int) -> Word:
        """With one more piece."""
        return Word((*self.pieces, piece), (*self.positions, position), self.group, self.embedding)


def byte_letters() -> dict[str, int]:
    """The letter by which CLIP's vocabulary writes each byte: itself where it prints, else one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_letters()


def decoded(pieces: Iterable[str]) -> str:
    """The text of one word's pieces."""
    letters = "".join(piece.removesuffix(WORD_END) for piece in pieces)
    if any(letter not in BYTES for letter in letters):
        return letters
    return bytes(BYTES[letter] for letter in letters).decode("utf-8", errors="replace")


def read_words(clip: Any, text: str) -> dict[str, list[Word]]:
    """The words of a prompt by text encoder, from the host's own tokens.

    A position is the token's row in the encoded (1, L, D): chunk after chunk, each with its own start and end. Raises
    ValueError for text encoders other than CLIP.
    """
    chunks = clip.tokenize(text, return_word_ids=True)
    if set(chunks) not in SERVED:
        raise ValueError(
            f"this text encoder reads the prompt with {', '.join(sorted(chunks))}; words can be chosen where CLIP "
            "reads it for a U-Net (SD 1.x, SD 2.x, SDXL): load a checkpoint of one of those families."
        )
    names = embedding_names(clip, text, chunks)
    return {encoder: assembled(found, clip, names.get(encoder, [])) for encoder, found in chunks.items()}


def assembled(chunks: list, clip: Any, names: list[tuple[str, list[Tensor]]]) -> list[Word]:
    """Pieces put together to words. Tokens of group 0 are the host's own: start, end, padding."""
    words: list[Word] = []
    vectors: dict[int, list[Tensor]] = {}
    tokens = [token for chunk in chunks for token in chunk]
    for position, (token, weight, group) in ((p, t) for p, t in enumerate(tokens) if t[2] != 0):
        last = words[-1] if words and words[-1].group == group else None
        if isinstance(token, Tensor):
            vectors.setdefault(group, []).append(token)
            piece, goes_on, embedding = "", last is not None, ""
        else:
            piece = clip.tokenizer.untokenize([(token, weight)])[0][1]
            goes_on, embedding = last is not None and not last.complete, None
        if goes_on:
            words[-1] = last.with_piece(piece, position)
        else:
            words.append(Word((piece,), (position,), group, embedding))
    return [named(word, vectors[word.group], names) if word.group in vectors else word for word in words]


def named(word: Word, vectors: list[Tensor], names: list[tuple[str, list[Tensor]]]) -> Word:
    """An embedding with the name whose vectors it has."""
    name = next((name for name, known in names if same_vectors(known, vectors)), "unknown")
    return Word(word.pieces, word.positions, word.group, name)


def same_vectors(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two embeddings are the same vectors."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def embedding_names(clip: Any, text: str, chunks: dict[str, list]) -> dict[str, list[tuple[str, list[Tensor]]]]:
    """By text encoder, the name of every embedding in the prompt and its vectors: each name tokenised alone."""
    if not any(vectors_in(found) for found in chunks.values()):
        return {}
    found: dict[str, list[tuple[str, list[Tensor]]]] = {}
    for written in dict.fromkeys(EMBEDDING_NAME.findall(text)):
        for encoder, alone in clip.tokenize(EMBEDDING + written, return_word_ids=True).items():
            found.setdefault(encoder, []).append((re.sub(r"\\(.)", r"\1", written), vectors_in(alone)))
    return found


def vectors_in(chunks: list) -> list[Tensor]:
    """The embedding vectors among tokens."""
    return [token[0] for chunk in chunks for token in chunk if isinstance(token[0], Tensor)]


def refuse_foreign_embeddings(tokens: dict[str, list], channels: int) -> None:
    """Raise ValueError for embeddings of another text encoder: the host leaves them out, and all behind moves up."""
    widths = {name: {vector.shape[-1] for vector in vectors_in(chunks)} for name, chunks in tokens.items()}
    if not any(widths.values()):
        return
    fits = all(len(found) == 1 for found in widths.values())
    one_each = [next(iter(found)) for found in widths.values() if fits]
    if not fits or channels not in (sum(one_each), *one_each):
        found = ", ".join(str(width) for width in sorted({width for each in widths.values() for width in each}))
        raise ValueError(
            f"an embedding in the prompt has {found} channels and is made for another text encoder (this one gives "
            f"{channels} in all): take that embedding out, or use its version for this model."
        )
