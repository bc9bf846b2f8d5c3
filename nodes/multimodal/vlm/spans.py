"""Which tokens of a prompt are text, and which are pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..interleaved import Picture


@dataclass(frozen=True)
class Span:
    """Tokens start..end of a prompt: a text, or a picture with the two or three tokens around it.

    side: pixels along the picture's side, 0 for a text.
    """

    start: int
    end: int
    picture: Picture | None = field(default=None, compare=False)
    side: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in it."""
        return self.end - self.start
