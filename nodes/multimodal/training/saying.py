"""What a text encoder says of the words of an interleaved prompt, and which of it each token stands for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....kernels.token_alignment import stand_for
from ... import host
from ...quoting import quoted
from ...training.prompts import literal
from ..interleaved import Picture, Prompt
from ..vlm import Span, VisionLanguage

PICTURE = 8.0  # how much a picture's tokens count together, where a word's counts 1
MOST_KNOWN = 2**29  # bytes of texts that are kept encoded: 13,000 captions of ten words for SD 1.5, 5,000 for SDXL


@dataclass(frozen=True, eq=False)
class Said:
    """What the tokens of a prompt should be.

    states (M, C): the text encoder's, of the prompt's words. chosen (L, M): the states that each token stands for.
    weight (L,): how much each token counts.
    """

    states: Tensor
    chosen: Tensor
    weight: Tensor

    def wanted(self) -> Tensor:
        """The tokens (L, C)."""
        return stand_for(self.states, self.chosen)


def batch(said: Sequence[Said]) -> tuple[Tensor, Tensor, Tensor]:
    """(wanted (B, L, C), token_mask (B, L), weight (B, L)) of prompts, shorter ones padded at their end."""
    wanted = torch.nn.utils.rnn.pad_sequence([each.wanted() for each in said], batch_first=True)
    weight = torch.nn.utils.rnn.pad_sequence([each.weight for each in said], batch_first=True)
    lengths = torch.tensor([len(each.weight) for each in said])
    return wanted, torch.arange(wanted.shape[1]) < lengths[:, None], weight


# ---- which words a token stands for ---------------------------------------------------------------------------------

Words = range  # of a prompt's words, by their numbers


def words_of(prompt: Prompt) -> list[str]:
    """The words of a prompt, its pictures left out; no word reaches over a picture."""
    return [word for part in prompt if isinstance(part, str) for word in part.split()]


def bound_words(prompt: Prompt, number: int) -> Words:
    """The words that a prompt's part, a picture, is bound to: those behind it that are its name.

    All words for a picture of another name: it shows the whole.
    """
    before = len(words_of(prompt[:number]))
    following = next((part for part in prompt[number + 1 :] if isinstance(part, str)), "")
    name = prompt[number].name
    if not " ".join(following.split()).casefold().startswith(" ".join(name.split()).casefold()):
        return range(len(words_of(prompt)))
    return range(before, before + max(1, len(name.split())))


def word_of_letters(vlm: VisionLanguage, prompt: Prompt, counts: Sequence[int]) -> list[int]:
    """For each letter of a prompt as its tokenizer is given it the word it belongs to; a blank to the next one."""
    found, said, counts = [], 0, iter(counts)
    for part in prompt:
        inside = False
        for letter in part if isinstance(part, str) else vlm.written((part,), [next(counts)]):
            begins = isinstance(part, str) and not letter.isspace() and not inside
            inside = isinstance(part, str) and not letter.isspace()
            said += begins
            found.append(said - inside)
    return found


def leaving_out(prompt: Prompt, generator: torch.Generator) -> Prompt:
    """A prompt without some of the words that its pictures are bound to: of each the first, from none to all.

    What is left out can only be seen in the picture. Parts stay as many as they are.
    """
    parts, everything = list(prompt), len(words_of(prompt))
    for number, part in enumerate(prompt[:-1]):
        following = parts[number + 1]
        bound = range(0) if isinstance(part, str) else bound_words(prompt, number)
        if len(bound) > 0 and isinstance(following, str) and bound != range(everything):
            gone = int(torch.randint(len(bound) + 1, (), generator=generator))
            parts[number + 1] = " " + " ".join(following.split()[gone:]) if gone else following
    return tuple(parts)


def kept_words(prompt: Prompt, whole: Prompt) -> list[int]:
    """For each word of a prompt its number in the whole, of which it leaves out the first words of some parts."""
    found, at = [], 0
    for part, full in zip(prompt, whole, strict=True):
        if isinstance(part, str):
            words = len(full.split())
            found += range(at + words - len(part.split()), at + words)
            at += words
    return found


def shared_out(words: Words, tokens: int) -> list[Words]:
    """The words that each of a picture's tokens stands for: all words in order, as evenly as they can be shared out.

    With fewer words than tokens each token has one, which several in a row may say; else each has an equal part.
    """
    starts = [i * len(words) // tokens for i in range(tokens + 1)]
    return [words[start : max(start + 1, stop)] for start, stop in itertools.pairwise(starts)]


def words_of_tokens(vlm: VisionLanguage, prompt: Prompt, whole: Prompt, layout: Sequence[Span]) -> list[Words | None]:
    """The words of the whole that each token of a prompt stands for; None for one that is no letter, such as the first.

    layout: the prompt's spans, of vlm.tokenised. Raises ValueError for a tokenizer that does not know where its tokens
    stand.
    """
    counts = [vlm.default_tokens() if p.tokens is None else p.tokens for p in prompt if isinstance(p, Picture)]
    text, kept = vlm.written(prompt, counts), kept_words(prompt, whole)
    if not getattr(vlm.tokenizer, "is_fast", False):
        raise ValueError(
            f"{vlm.name} has a tokenizer that does not tell where its tokens stand in a text, which the lessons align "
            "and read need: put its tokenizer.json into the folder, or set align_steps and read_steps to 0."
        )
    letters = word_of_letters(vlm, prompt, counts)
    found: list[Words | None] = [None] * layout[-1].end
    for token, (begin, end) in enumerate(vlm.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]):
        if kept and end > begin:
            at = max((i for i in range(begin, end) if not text[i].isspace()), default=begin)
            word = kept[min(letters[at], len(kept) - 1)]
            found[token] = range(word, word + 1)
    pictures = [i for i, part in enumerate(prompt) if isinstance(part, Picture)]
    for span, number in zip((span for span in layout if span.picture is not None), pictures, strict=True):
        found[span.start : span.end] = shared_out(bound_words(whole, number), span.tokens)
    return found


# ---- what is said of them -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Speaker:
    """A text encoder that says what tokens should be. known: what it said of the last texts."""

    model: Any
    clip: Any
    known: dict[str, tuple[Tensor, list[list[int]]]] = field(default_factory=dict)

    def of(self, words: Sequence[str]) -> tuple[Tensor, list[list[int]]]:
        """(states (M, C), the states of each word) of a text; the last is the mean of all that follow the start.

        Raises ValueError for another model's text encoder.
        """
        text = " ".join(words)
        if text not in self.known:
            with torch.no_grad():
                states = self.clip.encode_from_tokens(self.clip.tokenize(literal(text)), return_pooled=True)[0]
            host.require_width(self.model, states, "clip")
            states, rows = states[0].float().cpu(), self.rows(words)
            end = 1 + max((row for word in rows for row in word), default=0)
            kept = torch.cat([states[:end], states[1:].mean(0, keepdim=True)])
            while self.known and len(self.known) >= MOST_KNOWN // kept.nbytes:  # as if all were as long
                del self.known[next(iter(self.known))]
            self.known[text] = kept, rows
        return self.known[text]

    def rows(self, words: Sequence[str]) -> list[list[int]]:
        """The states of each word of a text: its pieces, counted by themselves. Raises ValueError where they differ."""
        left, found = self.pieces(" ".join(words)), []
        counts = [len(self.pieces(word)) for word in words]
        if sum(counts) != len(left):
            raise ValueError(
                f"the text encoder reads {quoted(' '.join(words))} in {len(left)} pieces, its words one by one in "
                f"{sum(counts)}: take names of embeddings and unusual signs out of this caption, or set align_steps "
                "and read_steps to 0."
            )
        for count in counts:
            found.append(left[:count])
            left = left[count:]
        return found

    def pieces(self, text: str) -> list[int]:
        """Where the pieces of a text stand among its tokens, without start, end and padding."""
        chunks = next(iter(self.clip.tokenize(literal(text), return_word_ids=True).values()))
        return [i for i, token in enumerate(token for chunk in chunks for token in chunk) if token[2] != 0]

    def say_all(self, vlm: VisionLanguage, prompts: Sequence[Prompt], wholes: Sequence[Prompt]) -> tuple[Said, ...]:
        """What the tokens of prompts should be; see say."""
        host.stop_if_cancelled()
        return tuple(self.say(vlm, *each) for each in zip(prompts, wholes, strict=True))

    def say(self, vlm: VisionLanguage, prompt: Prompt, whole: Prompt) -> Said:
        """What the tokens of a prompt should be; whole: with the words that it leaves out (leaving_out).

        Each token is the mean of its word's pieces; a picture's words are shared out over its tokens. A first token
        without letters is the text encoder's own. Where there is nothing to say all are the mean of what follows it.
        """
        words = words_of(whole)
        states, rows = self.of(words)
        layout = vlm.tokenised(prompt)[1]
        tokens = words_of_tokens(vlm, prompt, whole, layout)
        chosen = torch.zeros(len(tokens), len(states), dtype=torch.bool)
        weight = torch.ones(len(tokens))
        for token, each in enumerate(tokens):
            if not any(rows):
                chosen[token, -1] = True
            elif each is None:
                chosen[token, 0] = True
            else:
                chosen[token, [row for word in each for row in rows[word]]] = True
        for span in (span for span in layout if span.picture is not None):
            weight[span.start : span.end] = PICTURE / span.tokens
        return Said(states, chosen, weight * chosen.any(1))
