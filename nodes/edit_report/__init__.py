"""What an edit kept, and how well it follows its text."""

from .embedding import Embedder

__all__ = ["Embedder"]
