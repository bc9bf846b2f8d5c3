"""Exact text: lines of text that stand in a picture, what a text encoder is told of their look, and how they read."""

from .fonts import BUILT_IN
from .fonts import listed as font_names
from .learning import filled_polygon as filled
from .learning import lines_at, spoken, tokens_with
from .lines import STRIP, TextEmbedder, TextLine, TextLines
from .prompting import encoders
from .reading import Read, ReadSettings, crop, read
from .recogniser import shipped_recogniser

__all__ = [
    "BUILT_IN",
    "STRIP",
    "Read",
    "ReadSettings",
    "TextEmbedder",
    "TextLine",
    "TextLines",
    "crop",
    "encoders",
    "filled",
    "font_names",
    "lines_at",
    "read",
    "shipped_recogniser",
    "spoken",
    "tokens_with",
]
