"""Exact text: lines of text that stand in a picture, what a text encoder is told of their look, and how they read."""

from .lines import STRIP, TextEmbedder, TextLine, TextLines
from .recogniser import shipped_recogniser

__all__ = ["STRIP", "TextEmbedder", "TextLine", "TextLines", "shipped_recogniser"]
