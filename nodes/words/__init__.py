"""Words of prompts: what other techniques may know of them."""

from .reading import Word, decoded, read_words, refuse_foreign_embeddings, without_padding
from .selection import select
from .words import (
    WITHOUT_WORDS,
    ChosenWords,
    copies,
    joined_length,
    refuse_without_words,
    rows_of,
    shortened,
)

__all__ = [
    "WITHOUT_WORDS",
    "ChosenWords",
    "Word",
    "copies",
    "decoded",
    "joined_length",
    "read_words",
    "refuse_foreign_embeddings",
    "refuse_without_words",
    "rows_of",
    "select",
    "shortened",
    "without_padding",
]
