"""Chosen words of a prompt, and where that prompt stands among the sampled ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import host

WITHOUT_WORDS = "palimpsest_without_words"  # in a CONDITIONING whose tokens are no words: what made it


def refuse_without_words(prompts: Iterable[Mapping[str, Any]], node: str) -> None:
    """Raise ValueError where tokens of a prompt are no words; prompts: what stands beside them in a CONDITIONING."""
    made_by = next((prompt[WITHOUT_WORDS] for prompt in prompts if prompt.get(WITHOUT_WORDS)), None)
    if made_by:
        raise ValueError(
            f"{node} has tokens from Select Words, and a prompt of {made_by} is sampled, whose tokens are no words: "
            "disconnect tokens (all of the prompt is masked), or take route 'expressed text' and give that text to "
            "Select Words."
        )


@dataclass(frozen=True, eq=False)
class ChosenWords:
    """Words or phrases of one prompt and the positions of all their pieces among its L tokens.

    words: as a person wrote them; positions: for each of them the rows of `prompt` (1, L, D), the text tensor of the
    CONDITIONING that was made together with this choice. variants: the other text tensors of the same prompt, where a
    schedule on the text encoder makes several. length: how many rows the picture looks at where the network makes
    another text of the encoded one, 0 for L; the positions are rows of that one. phrase: the name of the host.Phrase
    whose rows these are, where it stands behind a prompt by name. nth: which one they are where a prompt holds the
    same text at several places, from 0; None: all of them.
    """

    words: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    prompt: Tensor
    variants: tuple[Tensor, ...] = ()
    length: int = 0
    phrase: str = ""
    nth: int | None = None

    def require_sound(self) -> None:
        """Raise ValueError where there is no word, or one behind the end of the prompt."""
        rows = self.every_position
        if not rows or rows[-1] >= self.rows:
            raise ValueError(
                f"the chosen words are tokens {rows or 'none'} of a prompt of {self.rows}: choose them by Select Words."
            )

    @property
    def rows(self) -> int:
        """How many rows the text has that the picture looks at."""
        return self.length or self.prompt.shape[1]

    @property
    def every_position(self) -> tuple[int, ...]:
        """The positions of all words together, ascending."""
        return tuple(sorted({position for word in self.positions for position in word}))

    @property
    def quoted(self) -> str:
        """The words as an error names them."""
        return ", ".join(map(repr, self.words))

    def offset(self, context: Tensor) -> int | None:
        """Row at which this prompt begins in a sampled context (B, M, D), whole or concatenated; None if it is absent.

        Found by equality of the tensors, so that a prompt is known wherever it went: combined, limited to an area,
        concatenated. One that was averaged or encoded by another text model is another prompt.
        """
        return next(iter(self.offsets(context)), None)

    def offsets(self, context: Tensor) -> tuple[int, ...]:
        """Every row at which this prompt begins: the host repeats a short context to the length of a longer one."""
        return tuple(sorted({row for wanted in (self.prompt, *self.variants) for row in rows_of(wanted[0], context)}))

    def among(self, conds: Iterable[Mapping[str, Any]]) -> bool:
        """Whether one of the guider's prompts holds these words."""
        if self.phrase:
            return any(phrase.name == self.phrase for cond in conds for phrase in cond.get(host.PHRASES, ()))
        texts = (cond.get("cross_attn") for cond in conds)
        return any(self.offsets(text) for text in texts if text is not None)

    def starts(self, prompt: host.Prompt, run: host.Run) -> tuple[int, ...]:
        """`offsets` in a sampled prompt, which a run looks up once; nowhere in one without text.

        Where the network has made another text of a prompt, what it was made of is searched, and only its beginning.
        """

        def look() -> tuple[int, ...]:
            if self.phrase:
                return tuple(row for name, row in prompt.phrases.items() if name == self.phrase)
            if prompt.encoded is not None:
                return tuple(row for row in self.offsets(prompt.encoded) if row == 0)
            found = () if prompt.text is None else self.offsets(prompt.text)
            return found if self.nth is None else found[min(self.nth, len(found) - 1) :][:1]

        return run.kept((self, prompt), look)


def rows_of(wanted: Tensor, context: Tensor) -> list[int]:
    """Rows at which `wanted` (L, D) begins in all pictures of a context (B, M, D)."""
    length = len(wanted)
    if context.shape[-1] != wanted.shape[-1] or context.shape[1] < length:
        return []
    wanted = wanted.to(context)
    starts = (context[:, : context.shape[1] - length + 1] == wanted[0]).all(-1).all(0).nonzero()[:, 0].tolist()
    return [row for row in starts if torch.equal(context[:, row : row + length], wanted.expand(len(context), -1, -1))]


# ---- prompts of different lengths that share a model call -----------------------------------------------------------


def joined_length(call: host.ModelCall) -> int:
    """Tokens to which the host repeats the prompts of a call, so that all are equally long."""
    return math.lcm(*(prompt.length for prompt in call.prompts))


def copies(call: host.ModelCall) -> list[range]:
    """The tokens at which the copies of each of a call's prompts begin."""
    joined = joined_length(call)
    return [range(0, joined, prompt.length) for prompt in call.prompts]


def shortened(call: host.ModelCall, keys: int) -> ValueError:
    """The error where a layer has fewer keys than the prompts have tokens."""
    return ValueError(
        f"a prompt of {joined_length(call)} tokens reaches a layer as {keys}: another node shortens the text that the "
        "model sees, and chosen words cannot be found in the rest: take that node out."
    )
