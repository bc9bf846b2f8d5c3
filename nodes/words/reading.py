"""A prompt as the text encoder reads it: its words, the pieces of each, and which rows of the CONDITIONING they are."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .encoders import (
    BYTES,
    CLIP,
    SPELLING,
    UNKNOWN,
    Growing,
    groups_of,
    loaded,
    raw,
    template_of,
    tokenizer_of,
    trimmed,
    without_template,
)

WORD_END = "</w>"  # closes the last piece of a word in CLIP's vocabulary
EMBEDDING = "embedding:"
EMBEDDING_NAME = re.compile(re.escape(EMBEDDING) + r"((?:\\.|[^\s,:()<>\[\]\\])+)")


@dataclass(frozen=True)
class Word:
    """One word, number, run of punctuation or embedding of a prompt, with its pieces and their positions.

    group: the run of text or the embedding that the host tokenised in one go; no word spans two. spelling: how the
    vocabulary writes pieces.
    """

    pieces: tuple[str, ...]
    positions: tuple[int, ...]
    group: int
    embedding: str | None = None
    spelling: str = CLIP

    @property
    def text(self) -> str:
        """As the text encoder reads it: CLIP in small letters; embedding:name for an embedding."""
        return EMBEDDING + self.embedding if self.embedding is not None else spelled(self.pieces, self.spelling)

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
        pieces, positions = (*self.pieces, piece), (*self.positions, position)
        return Word(pieces, positions, self.group, self.embedding, self.spelling)


def decoded(pieces: Iterable[str]) -> str:
    """The text of one word's pieces."""
    letters = "".join(piece.removesuffix(WORD_END) for piece in pieces)
    if any(letter not in BYTES for letter in letters):
        return letters
    return bytes(BYTES[letter] for letter in letters).decode("utf-8", errors="replace")


def spelled(pieces: Iterable[str], spelling: str) -> str:
    """The text of one word's pieces, in the spelling of any vocabulary, without spaces and signs around it."""
    if spelling == CLIP:
        return decoded(pieces)
    return trimmed(b"".join(raw(piece, spelling) for piece in pieces if piece != UNKNOWN).decode(errors="replace"))


def read_words(clip: Any, text: str) -> dict[str, list[Word]]:
    """The words of a prompt by text encoder, from the host's own tokens.

    A position is the number of a token among all of its encoder, chunk after chunk, each with its own start and end:
    the row in the encoded (1, L, D), but for what `row_offsets` says. Encoders whose tokens are no rows are left out.
    Raises ValueError for text encoders that are not served.
    """
    chunks = clip.tokenize(text, return_word_ids=True)
    served = {name for group in groups_of(set(chunks)) for name in group if loaded(clip, name)}
    names = embedding_names(clip, text, chunks)
    return {
        encoder: assembled(found, clip, encoder, text, names.get(encoder, []))
        for encoder, found in chunks.items()
        if encoder in served
    }


def row_offsets(clip: Any, tokens: dict[str, list], rows: int) -> dict[str, int]:
    """By text encoder, what to add to a token's number for its row in the encoded text of so many rows.

    CLIP's tokens are rows from the first on. A language model's are counted from the last: the host cuts the beginning
    of Qwen-Image's template off, and a picture in a prompt becomes many rows.
    """
    found, before = {}, 0
    for group in groups_of(set(tokens)):
        present = [name for name in group if loaded(clip, name)]
        length = min((sum(map(len, tokens[name])) for name in present), default=0)
        alone = present and before == 0 and SPELLING[present[0]] != CLIP
        found |= dict.fromkeys(present, rows - length if alone else before)
        before += length
    return found


def without_padding(clip: Any, text: str, rows: int) -> int:
    """How many of the rows of an encoded text are left without the padding at its end.

    CLIP's 77 stay: a U-Net repeats prompts that share a call to one length.
    """
    tokens = clip.tokenize(text, return_word_ids=True)
    name = [name for group in groups_of(set(tokens)) for name in group if loaded(clip, name)][-1]
    pad, padding = getattr(tokenizer_of(clip, name), "pad_token", None), 0
    if SPELLING[name] != CLIP:
        for token, _, group in reversed(tokens[name][-1]):
            if group != 0 or isinstance(token, Tensor) or token != pad:
                break
            padding += 1
    return rows - padding


def assembled(chunks: list, clip: Any, encoder: str, text: str, names: list[tuple[str, list[Tensor]]]) -> list[Word]:
    """Pieces put together to words. Tokens of group 0 are the host's own: start, end, padding."""
    spelling, tokenizer = SPELLING[encoder], tokenizer_of(clip, encoder)
    vectors: dict[int, list[Tensor]] = {}
    tokens = [(p, *token) for p, token in enumerate(token for chunk in chunks for token in chunk) if token[2] != 0]
    read = [(p, piece_of(tokenizer, token, weight), group) for p, token, weight, group in tokens]
    if spelling != CLIP:
        written = [b"" if piece is None else raw(piece, spelling) for _, piece, _ in read]
        inside = without_template(written, *template_of(clip.tokenizer, text))
        tokens, read = ([each[i] for i in inside] for each in (tokens, read))
    for _, token, _, group in (token for token in tokens if isinstance(token[1], Tensor)):
        vectors.setdefault(group, []).append(token)
    words = ended_words(read) if spelling == CLIP else spaced_words(read, spelling)
    return [named(word, vectors[word.group], names) if word.embedding is not None else word for word in words]


def piece_of(tokenizer: Any, token: Any, weight: float) -> str | None:
    """How the vocabulary writes a token; None for a vector of an embedding."""
    return None if isinstance(token, Tensor) else tokenizer.untokenize([(token, weight)])[0][1]


Piece = tuple[int, "str | None", int]  # position, as the vocabulary writes it, group


def ended_words(pieces: list[Piece]) -> list[Word]:
    """Words of a vocabulary that marks where one ends."""
    words: list[Word] = []
    for position, piece, group in pieces:
        last = words[-1] if words and words[-1].group == group else None
        goes_on = last is not None and (piece is None or not last.complete)
        if goes_on:
            words[-1] = last.with_piece(piece or "", position)
        else:
            words.append(Word((piece or "",), (position,), group, "" if piece is None else None))
    return words


def spaced_words(pieces: list[Piece], spelling: str) -> list[Word]:
    """Words of a vocabulary whose pieces hold the space before them; a space alone belongs to none."""
    words: list[Word] = []
    growing = Growing()
    for position, piece, group in pieces:
        last = words[-1] if words and words[-1].group == group else None
        written = b"" if piece is None else raw(piece, spelling)
        if piece is not None and not written.strip():
            growing = Growing()
            continue
        goes_on = last is not None and (last.embedding is not None if piece is None else growing.takes(written))
        if goes_on:
            words[-1] = last.with_piece(piece or "", position)
        else:
            growing = Growing()
            words.append(Word((piece or "",), (position,), group, "" if piece is None else None, spelling))
        growing.content += written
    return words


def named(word: Word, vectors: list[Tensor], names: list[tuple[str, list[Tensor]]]) -> Word:
    """An embedding with the name whose vectors it has."""
    name = next((name for name, known in names if same_vectors(known, vectors)), "unknown")
    return Word(word.pieces, word.positions, word.group, name, word.spelling)


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
