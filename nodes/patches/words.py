"""Words of a prompt: which rows of its CONDITIONING they are, and where that prompt stands among the sampled ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ChosenWords:
    """Words or phrases of one prompt and the positions of all their pieces among its L tokens.

    words: as a person wrote them; positions: for each of them the rows of `prompt` (1, L, D), the text tensor of the
    CONDITIONING that was made together with this choice.
    """

    words: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    prompt: Tensor

    @property
    def every_position(self) -> tuple[int, ...]:
        """The positions of all words together, ascending."""
        return tuple(sorted({place for places in self.positions for place in places}))

    def offset(self, context: Tensor) -> int | None:
        """Row at which this prompt begins in a sampled context (B, M, D), whole or concatenated; None if it is absent.

        Found by equality of the tensors, so that a prompt is known wherever it went: combined, limited to an area,
        concatenated. One that was averaged or encoded by another text model is another prompt.
        """
        rows, wanted = self.prompt.shape[1], self.prompt[0]
        if context.shape[-1] != wanted.shape[-1]:
            return None
        wanted = wanted.to(context)
        for start in range(context.shape[1] - rows + 1):
            if bool((context[:, start : start + rows] == wanted).all()):
                return start
        return None
