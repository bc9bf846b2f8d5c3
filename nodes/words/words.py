"""Words of a prompt: which rows of its CONDITIONING they are, and where that prompt stands among the sampled ones."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChosenWords:
    """Words or phrases of one prompt and the positions of all their pieces among its L tokens.

    words: as a person wrote them; positions: for each of them the rows of `prompt` (1, L, D), the text tensor of the
    CONDITIONING that was made together with this choice. variants: the other text tensors of the same prompt, where a
    schedule on the text encoder makes several.
    """

    words: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    prompt: Tensor
    variants: tuple[Tensor, ...] = ()

    @property
    def every_position(self) -> tuple[int, ...]:
        """The positions of all words together, ascending."""
        return tuple(sorted({place for places in self.positions for place in places}))

    def offset(self, context: Tensor) -> int | None:
        """Row at which this prompt begins in a sampled context (B, M, D), whole or concatenated; None if it is absent.

        Found by equality of the tensors, so that a prompt is known wherever it went: combined, limited to an area,
        concatenated. One that was averaged or encoded by another text model is another prompt.
        """
        return next(iter(self.offsets(context)), None)

    def offsets(self, context: Tensor) -> tuple[int, ...]:
        """Every row at which this prompt begins: the host repeats a short context to the length of a longer one."""
        return tuple(sorted({row for wanted in (self.prompt, *self.variants) for row in rows_of(wanted[0], context)}))


def rows_of(wanted: Tensor, context: Tensor) -> list[int]:
    """Rows at which `wanted` (L, D) begins in all pictures of a context (B, M, D)."""
    length = len(wanted)
    if context.shape[-1] != wanted.shape[-1] or context.shape[1] < length:
        return []
    wanted = wanted.to(context)
    starts = (context[:, : context.shape[1] - length + 1] == wanted[0]).all(-1).all(0).nonzero()[:, 0].tolist()
    return [row for row in starts if torch.equal(context[:, row : row + length], wanted.expand(len(context), -1, -1))]


# ---- the prompt as the text encoder reads it ------------------------------------------------------------------------

WORD_END = "</w>"  # closes the last piece of a word in CLIP's vocabulary
EMBEDDING = "embedding:"
EMBEDDING_NAME = re.compile(re.escape(EMBEDDING) + r"((?:\\.|[^\s,:()<>\[\]\\])+)")
# Text encoders whose tokens a U-Net's cross-attention looks at one by one, by the names the host gives them.
SERVED = ({"l"}, {"h"}, {"g"}, {"l", "g"})
STOP = """
a an the this that these those some any each every my your his her its our their it he she they i you we
of in on at by to from with without for as into onto over under above below near behind between through
and or but nor so than then there is are was were be been being has have had do does did not no very s t
"""
STOP_WORDS = frozenset(STOP.split())


@dataclass(frozen=True)
class Word:
    """One word, number, run of punctuation or embedding of a prompt, with its pieces and their rows.

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

    A row is the token's place in the encoded (1, L, D): chunk after chunk, each with its own start and end. Raises
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


# ---- what a person asks for -----------------------------------------------------------------------------------------

NUMBERED = re.compile(r"(.*?)\s*#\s*(\d+)", re.DOTALL)
EVERY_CONTENT_WORD = "*"


def choose(words: list[Word], asked: str, read: Callable[[str], list[Word]]) -> dict[str, tuple[Word, ...]]:
    """The words that each entry of a comma-separated list names, by the entry, punctuation within phrases included.

    An entry is a word, a phrase, embedding:name or an embedding's bare name; `cat#2` is its second occurrence in the
    prompt, without a number all of them are meant. In an entry, * stands for any letters (`paint*`), and alone between
    words for one word (`red *`). A lone * is every word but stop words and punctuation, each by itself. Case and
    punctuation do not count. read: the words of a text by the same text encoder.
    Raises ValueError for an entry that is not in the prompt, and for an empty list.
    """
    entries = [entry.strip() for entry in re.split(r"[,\n]", asked)]
    entries = [entry for entry in entries if entry]
    spoken = [word for word in words if word.spoken]
    if EVERY_CONTENT_WORD in entries:
        at = entries.index(EVERY_CONTENT_WORD)
        content = [word.text for word in spoken if word.text.strip("'") not in STOP_WORDS]
        entries[at : at + 1] = content
    if not entries:
        raise ValueError(
            f"words is {asked!r} and chooses nothing: write one or more of the prompt's words, separated by commas, or "
            f"* for all. {listed(spoken)}"
        )
    return {entry: named_by(entry, words, spoken, read) for entry in dict.fromkeys(entries)}


def named_by(entry: str, words: list[Word], spoken: list[Word], read: Callable) -> tuple[Word, ...]:
    """The words of one entry."""
    numbered = NUMBERED.fullmatch(entry)
    phrase, number = (numbered.group(1), int(numbered.group(2))) if numbered else (entry, None)
    patterns = patterns_of(phrase, spoken, read)
    found = [
        spoken[first : first + len(patterns)]
        for first in range(len(spoken) - len(patterns) + 1 if patterns else 0)
        if all(p.fullmatch(word.text) for p, word in zip(patterns, spoken[first:], strict=False))
    ]
    if not found:
        raise ValueError(f"{phrase!r} is not in the prompt. {listed(spoken)}")
    if number is not None and not 1 <= number <= len(found):
        times = "once" if len(found) == 1 else f"{len(found)} times"
        raise ValueError(f"{entry!r} asks for occurrence {number}, but {phrase!r} is in the prompt {times}.")
    chosen = found if number is None else [found[number - 1]]
    spans = [(words.index(phrase[0]), words.index(phrase[-1])) for phrase in chosen]
    return tuple(word for i, word in enumerate(words) if any(first <= i <= last for first, last in spans))


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
    return "Its words are: " + ", ".join(texts) + "." if texts else "The prompt has no words."


# ---- the node -------------------------------------------------------------------------------------------------------


def select(clip: Any, text: str, asked: str) -> tuple[ChosenWords, list, str]:
    """(chosen words, CONDITIONING of the text, report) for a prompt and a list of words.

    Raises ValueError as read_words and choose do, and where SDXL's two text encoders read a word at different places.
    """
    if clip is None:
        raise ValueError("clip is empty: this checkpoint holds no text encoder; connect one (Load CLIP).")
    by_encoder = read_words(clip, text)
    chosen = {name: choose(words, asked, lambda part, n=name: read_words(clip, part)[n])
              for name, words in by_encoder.items()}  # fmt: skip
    first, *others = (
        {entry: tuple(place for word in words for place in word.positions) for entry, words in found.items()}
        for found in chosen.values()
    )
    for entry in (entry for other in others for entry in first if other.get(entry) != first[entry]):
        raise ValueError(
            f"the two text encoders of this model read {entry!r} at different places of the prompt (an embedding "
            "before it has another length for each): take that embedding out, or write it behind the chosen words."
        )
    tokens = clip.tokenize(text)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    tensors = [tensor for tensor, _ in conditioning]
    refuse_foreign_embeddings(tokens, tensors[0].shape[-1])
    for entry, places in first.items():
        if max(places) >= tensors[0].shape[1]:
            raise ValueError(
                f"{entry!r} lies at token {max(places)}, but the text encoder cuts this prompt after "
                f"{tensors[0].shape[1]}: shorten the prompt."
            )
    words = ChosenWords(tuple(first), tuple(first.values()), tensors[0], tuple(tensors[1:]))
    return words, conditioning, report(next(iter(by_encoder.values())), words, text)


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
            f"{channels} in all): take it out, or use its version for this model."
        )


def report(read: list[Word], chosen: ChosenWords, text: str) -> str:
    """The prompt as it was tokenised, with the chosen words in brackets, and the tokens of each.

    Pieces of one word are joined by "+"; an embedding is followed by the number of its vectors.
    """
    marked = set(chosen.every_position)
    shown = []
    for word in read:
        pieces = f"{word.text} x{len(word.pieces)}" if word.embedding is not None else "+".join(
            decoded([piece]) for piece in word.pieces
        )  # fmt: skip
        shown.append(f"[{pieces}]" if marked.intersection(word.positions) else pieces)
    places = "; ".join(
        f"{word}: {', '.join(map(str, places))}" for word, places in zip(chosen.words, chosen.positions, strict=True)
    )
    lines = [" ".join(shown), f"tokens of {places}", f"{chosen.prompt.shape[1]} tokens in all, start and end included"]
    if re.search(r"\bBREAK\b", text):
        lines.append(
            "BREAK is read as the word break, as the host reads it; to give parts of a prompt tokens of their own, "
            "encode them apart and join them by Conditioning (Concat)"
        )
    return "\n".join(lines)
