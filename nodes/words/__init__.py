"""Words of prompts: what other techniques may know of them."""

from .reading import Word, decoded, read_words, refuse_foreign_embeddings, without_padding
from .selection import select
from .words import ChosenWords, copies, joined_length, rows_of, shortened

__all__ = [
    "ChosenWords",
    "Word",
    "copies",
    "decoded",
    "joined_length",
    "read_words",
    "refuse_foreign_embeddings",
    "rows_of",
    "select",
    "shortened",
    "without_padding",
]
