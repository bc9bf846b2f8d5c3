"""A prompt, encoded, and the words of it that a person chose."""

from __future__ import annotations

import re
from typing import Any

from ..quoting import quoted
from .choosing import choose
from .encoders import groups_of, rows_of_text
from .reading import Word, read_words, refuse_foreign_embeddings, row_offsets, spelled
from .words import ChosenWords

Positions = dict[str, tuple[int, ...]]  # what was asked for -> rows of the CONDITIONING


def select(clip: Any, text: str, asked: str) -> tuple[ChosenWords, list, str]:
    """(chosen words, CONDITIONING of the text, report) for a prompt and a list of words.

    Raises ValueError as read_words and choose do, and where SDXL's two text encoders read a word at different places.
    """
    if clip is None:
        raise ValueError("clip is empty: this checkpoint holds no text encoder; connect one (Load CLIP).")
    by_encoder = read_words(clip, text)
    groups = positions_of_groups(clip, by_encoder, asked)
    tokens = clip.tokenize(text)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    tensors = [tensor for tensor, _ in conditioning]
    refuse_foreign_embeddings(tokens, tensors[0].shape[-1])
    rows = rows_of_text(tokens, tensors[0].shape[1])
    offsets = row_offsets(clip, tokens, rows)
    positions = in_rows(groups, offsets)
    refuse_what_is_cut(positions, rows)
    words = ChosenWords(tuple(positions), tuple(positions.values()), tensors[0], tuple(tensors[1:]), rows)
    encoder, read = next(iter(by_encoder.items()))
    return words, conditioning, report(read, words, text, offsets[encoder])


def positions_of_groups(clip: Any, by_encoder: dict[str, list[Word]], asked: str) -> dict[str, Positions]:
    """Where the chosen words are among the tokens of each group of text encoders, by one that stands for it.

    Words that the first group found for * are asked for in the others. Raises ValueError as common_positions does.
    """
    found: dict[str, Positions] = {}
    for group in groups_of(set(clip.tokenize("", return_word_ids=True))):
        present = {name: by_encoder[name] for name in group if name in by_encoder}
        if present:
            found[next(iter(present))] = common_positions(clip, present, asked)
            asked = ", ".join(next(iter(found.values())))
    return found


def in_rows(groups: dict[str, Positions], offsets: dict[str, int]) -> Positions:
    """Rows of the encoded text from the numbers of tokens, all groups of text encoders together."""
    first = next(iter(groups.values()))
    return {
        entry: tuple(offsets[name] + row for name, positions in groups.items() for row in positions[entry])
        for entry in first
    }


def common_positions(clip: Any, by_encoder: dict[str, list[Word]], asked: str) -> Positions:
    """Where the chosen words are. Raises ValueError where two text encoders read one at different places."""
    first, *others = (positions_of(clip, encoder, words, asked) for encoder, words in by_encoder.items())
    for entry in (entry for other in others for entry in first if other.get(entry) != first[entry]):
        raise ValueError(
            f"the two text encoders of this model read {quoted(entry)} at different places of the prompt (an embedding "
            "before it has another length for each): take that embedding out, or write it behind the chosen words."
        )
    return first


def positions_of(clip: Any, encoder: str, words: list[Word], asked: str) -> Positions:
    """Where the chosen words are for one text encoder."""
    chosen = choose(words, asked, lambda part: read_words(clip, part)[encoder])
    return {entry: tuple(row for word in found for row in word.positions) for entry, found in chosen.items()}


def refuse_what_is_cut(positions: Positions, encoded: int) -> None:
    """Raise ValueError for words behind the end of what the text encoder gives."""
    for entry, rows in positions.items():
        if max(rows) >= encoded:
            raise ValueError(
                f"{quoted(entry)} lies at token {max(rows)}, but the text encoder cuts this prompt after "
                f"{encoded}: shorten the prompt."
            )


# ---- the report -----------------------------------------------------------------------------------------------------

BREAK_NOTE = (
    "BREAK is read as the word break, as the host reads it; to give parts of a prompt tokens of their own, encode them "
    "apart and join them by Conditioning (Concat)"
)


def report(read: list[Word], chosen: ChosenWords, text: str, offset: int = 0) -> str:
    """The prompt as it was tokenised, with the chosen words in brackets, and the tokens of each.

    offset: what was added to a token's number for its row.
    """
    marked = {row - offset for row in chosen.every_position}
    shown = [f"[{in_pieces(word)}]" if marked.intersection(word.positions) else in_pieces(word) for word in read]
    tokens = "; ".join(
        f"{word}: {', '.join(map(str, rows))}" for word, rows in zip(chosen.words, chosen.positions, strict=True)
    )
    total = f"{chosen.rows} tokens in all, start and end included"
    notes = [BREAK_NOTE] if re.search(r"\bBREAK\b", text) else []
    return "\n".join([" ".join(shown), f"tokens of {tokens}", total, *notes])


def in_pieces(word: Word) -> str:
    """A word's pieces, joined by "+"; an embedding with the number of its vectors."""
    if word.embedding is not None:
        return f"{word.text} x{len(word.pieces)}"
    return "+".join(spelled([piece], word.spelling) for piece in word.pieces)
