"""Cross-attention with words masked by region, and recorders that look on: the front for other techniques."""

from .attention import attach

__all__ = ["attach"]
