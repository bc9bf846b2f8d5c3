"""The two prompts of an attention fusion: which tokens of the edit act where which tokens of the source did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import attention_fusion as maths
from .. import border
from ..host.cancelling import Cancellable
from ..quoting import quoted
from ..words import ChosenWords, Word, read_words, refuse_foreign_embeddings, rows_of, select

CHUNK = 77  # tokens of a prompt that CLIP encodes at once
LONGEST = 64 * CHUNK  # tokens of a prompt that are compared: time and memory grow with the product of both lengths

NEW_WORDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "their own attention": maths.kept_words,
    "attention of the words they replace": maths.replaced_words,
}


@dataclass(frozen=True, eq=False)
class Prompts:
    """A source's prompt and an edit's, and what the edit's tokens take from the source's.

    source, edit: their CONDITIONINGs. texts: the edit's text tensors (1, T, D), by which it is found among the sampled
    prompts. link (S, T), own (T,): see kernels. words: those of the source whose attention makes the mask, or None.
    """

    source: list
    edit: list
    texts: tuple[Tensor, ...]
    link: Tensor
    own: Tensor
    words: ChosenWords | None
    report: str

    def offset(self, text: Tensor | None) -> int | None:
        """Row at which the edit's prompt begins in a sampled one; None if it is not in it."""
        found = [] if text is None else [row for known in self.texts for row in rows_of(known[0], text)]
        return min(found, default=None)


@dataclass(frozen=True, eq=False)
class EncodedText:
    """A prompt as the model sees it, a CONDITIONING of `length` tokens, and the words that lie within them."""

    conditioning: list
    words: list[Word]

    @property
    def length(self) -> int:
        """Tokens."""
        return self.conditioning[0][0].shape[1]

    @property
    def counted(self) -> list[tuple[tuple, tuple[int, ...]]]:
        """The words for the kernels: two are the same if text and number of tokens are."""
        return [((word.text, len(word.positions)), word.positions) for word in self.words]

    @property
    def wordless(self) -> list[list[int]]:
        """Positions that are no word's, by chunk: start, end, padding."""
        taken = {position for word in self.words for position in word.positions}
        chunk = CHUNK if self.length % CHUNK == 0 else self.length
        chunks = (range(at, at + chunk) for at in range(0, self.length, chunk))
        return [[position for position in positions if position not in taken] for positions in chunks]


def encode(clip: Any, text: str) -> EncodedText:
    """A text, as CLIP Text Encode encodes it, and its words.

    Raises ValueError for text encoders other than CLIP, and where SDXL's two place a word differently.
    """
    tokens = clip.tokenize(text)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    refuse_foreign_embeddings(tokens, conditioning[0][0].shape[-1])
    conditioning = border.conditioning(conditioning, f"the prompt {quoted(text)}")
    first, *others = read_words(clip, text).values()
    if any([word.positions for word in first] != [word.positions for word in other] for other in others):
        raise ValueError(
            f"the two text encoders of this model read {quoted(text)} at different places (an embedding has another "
            "length for each): take that embedding out."
        )
    length = conditioning[0][0].shape[1]
    return EncodedText(conditioning, [word for word in first if word.positions[-1] < length])


def refuse_endless(clip: Any, text: str) -> None:
    """Raise ValueError for a text of more tokens than two prompts are compared in."""
    count = max(sum(map(len, chunks)) for chunks in clip.tokenize(text).values())
    if count > LONGEST:
        raise ValueError(
            f"the prompt {quoted(text)} has {count} tokens, Attention Fusion compares two prompts of at most {LONGEST} "
            "each: shorten it."
        )


def read_prompts(
    clip: Any,
    source_text: str,
    edit_text: str,
    *,
    blend_words: str = "",
    new_words: str = "their own attention",
    emphasis: float = 1.0,
) -> Prompts:
    """Encode both prompts and compare them, word by word.

    emphasis multiplies the attention of words that only the edit has. Raises ValueError as `encode`, without a text
    encoder, for endless texts, and for blend words that are not in the source's prompt. A cancelled run stops within.
    """
    if clip is None:
        raise ValueError("clip is empty: this checkpoint holds no text encoder; connect one (Load CLIP).")
    for text in (source_text, edit_text):
        refuse_endless(clip, text)
    with Cancellable():
        source, edit = encode(clip, source_text), encode(clip, edit_text)
        link, own = linked(source, edit, NEW_WORDS[new_words])
        kept = {j for _, j in maths.common(*([name for name, _ in each.counted] for each in (source, edit)))}
    changed = [word for j, word in enumerate(edit.words) if j not in kept]
    positions = [position for word in changed for position in word.positions]
    link[:, positions] *= emphasis
    own[positions] *= emphasis
    words = select(clip, source_text, blend_words)[0] if blend_words.strip() else None
    return Prompts(
        source=source.conditioning,
        edit=edit.conditioning,
        texts=tuple(tensor for tensor, _ in edit.conditioning),
        link=link,
        own=own,
        words=words,
        report=described(source.words, edit.words, changed, words),
    )


def linked(source: EncodedText, edit: EncodedText, rule: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(link (S, T), own (T,)) of two prompts: words by a rule; start meets start, end meets end, padding padding."""
    link, own = torch.zeros(source.length, edit.length), torch.ones(edit.length)
    words, new = rule(source.counted, edit.counted)
    link[: words.shape[0], : words.shape[1]], own[: len(new)] = words, new
    for old, fresh in zip(source.wordless, edit.wordless, strict=False):
        count = min(len(old), len(fresh))
        maths.connect(link, own, old[:count], fresh[:count])
    return link, own


def described(source: list[Word], edit: list[Word], changed: list[Word], words: ChosenWords | None) -> str:
    """A sentence on what the two prompts share."""
    remaining = {word.text for word in edit}
    gone = [word for word in source if word.text not in remaining]
    parts = [f"{len(edit) - len(changed)} of {len(edit)} words are the source's"]
    for what, found in (("new", changed), ("gone", gone)):
        if found:
            parts.append(f"{what}: " + ", ".join(dict.fromkeys(word.text for word in found)))
    if words is not None:
        parts.append("the edit's own structure where the source has " + ", ".join(words.words))
    return "; ".join(parts)
