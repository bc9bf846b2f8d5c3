"""Text encoders whose words can be chosen: how each writes pieces of words, and which rows of the text they become.

The host's own tokenizers cut a prompt; what is here is how to read what they made of it.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

# How a vocabulary writes pieces: CLIP ends a word by a mark; byte pairs and sentence pieces begin one by a space.
CLIP, BYTE_PAIRS, SENTENCE_PIECES = "clip", "byte pairs", "sentence pieces"
SPELLING = {
    "l": CLIP, "g": CLIP, "h": CLIP,
    "t5xxl": SENTENCE_PIECES, "umt5xxl": SENTENCE_PIECES, "gemma2_2b": SENTENCE_PIECES,
    "qwen3_4b": BYTE_PAIRS, "qwen3_8b": BYTE_PAIRS, "qwen25_7b": BYTE_PAIRS, "mistral3_24b": BYTE_PAIRS,
}  # fmt: skip

# By the text encoders that the host gives a prompt to, those whose tokens are rows of the encoded text: encoders side
# by side share rows, one group of them stands behind the other.
ROWS: dict[frozenset[str], tuple[tuple[str, ...], ...]] = {
    frozenset(names): groups
    for names, groups in (
        (("l",), (("l",),)),
        (("h",), (("h",),)),
        (("g",), (("g",),)),
        (("l", "g"), (("l", "g"),)),
        (("l", "t5xxl"), (("t5xxl",),)),  # FLUX.1: CLIP gives a pooled vector only
        (("t5xxl",), (("t5xxl",),)),  # Chroma
        (("l", "g", "t5xxl"), (("g", "l"), ("t5xxl",))),  # SD 3
        (("gemma2_2b",), (("gemma2_2b",),)),  # Lumina Image 2
        (("qwen3_4b",), (("qwen3_4b",),)),  # Z-Image, Klein 4B
        (("qwen3_8b",), (("qwen3_8b",),)),  # Klein 9B
        (("qwen25_7b",), (("qwen25_7b",),)),  # Qwen-Image
        (("mistral3_24b",), (("mistral3_24b",),)),  # FLUX.2
        (("umt5xxl",), (("umt5xxl",),)),  # Wan
        (("qwen3_06b", "t5xxl"), (("t5xxl",),)),  # Anima: the network makes a row of each of T5's tokens
    )
}
ADAPTED = frozenset({"qwen3_06b", "t5xxl"})  # Anima's, whose encoded text is not the one that the picture looks at
MODELS = (
    "SD 1.x, SD 2.x, SDXL, SD 3, FLUX.1, FLUX.2, Klein, Chroma, Z-Image, Lumina Image 2, Qwen-Image, Wan 2.1 and 2.2, "
    "Anima"
)
UNKNOWN = "<unk>"
RAW_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def groups_of(names: set[str]) -> tuple[tuple[str, ...], ...]:
    """ROWS of some text encoders. Raises ValueError, naming them, for others."""
    groups = ROWS.get(frozenset(names))
    if groups is None:
        raise ValueError(
            f"this text encoder reads the prompt with {', '.join(sorted(names))}; words can be chosen in prompts for "
            f"{MODELS}: load the text encoder of one of those models."
        )
    return groups


def rows_of_text(tokens: dict[str, list], encoded: int) -> int:
    """Rows of the text that the picture looks at: as many as are encoded, or as T5 has tokens in Anima."""
    return sum(map(len, tokens["t5xxl"])) if frozenset(tokens) == ADAPTED else encoded


def tokenizer_of(clip: Any, name: str) -> Any:
    """The host's tokenizer of one text encoder of a CLIP."""
    return getattr(clip.tokenizer, name, None) or getattr(clip.tokenizer, f"clip_{name}", clip.tokenizer)


def loaded(clip: Any, name: str) -> bool:
    """Whether a CLIP has the text encoder at all: SD 3 is loaded with some of its three."""
    model = getattr(clip, "cond_stage_model", None)
    for attribute in (name, f"clip_{name}"):
        if hasattr(model, attribute):
            return getattr(model, attribute) is not None
    return True


def byte_letters() -> dict[str, int]:
    """The letter by which the vocabularies of CLIP and of byte pairs write each byte: itself where it prints."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_letters()


def raw(piece: str, spelling: str) -> bytes:
    """The bytes of text that a piece stands for, spaces included."""
    if spelling == SENTENCE_PIECES:
        byte = RAW_BYTE.fullmatch(piece)
        return bytes([int(byte.group(1), 16)]) if byte else piece.replace("\u2581", " ").encode()
    if any(letter not in BYTES for letter in piece):
        return piece.encode()
    return bytes(BYTES[letter] for letter in piece)


# ---- the template around a prompt -----------------------------------------------------------------------------------


def template_of(tokenizer: Any, text: str) -> tuple[str, str]:
    """What the host writes before and behind a prompt for this text encoder."""
    template = getattr(tokenizer, "llama_template", None)
    if not isinstance(template, str) or "{}" not in template or text.startswith("<|im_start|>"):
        return "", ""
    before, _, behind = template.partition("{}")
    return before, behind


def without_template(pieces: list[bytes], before: str, behind: str) -> range:
    """Which pieces lie between a template's two parts, where they are written out at both ends."""
    first, stop, lead, rest = 0, len(pieces), len(before.encode()), len(behind.encode())
    while first < stop and lead > 0:
        lead -= len(pieces[first])
        first += 1
    while stop > first and rest > 0:
        stop -= 1
        rest -= len(pieces[stop])
    return range(first, stop)


# ---- words of pieces that begin with a space ------------------------------------------------------------------------

LETTERS, SIGNS, IDEOGRAM = "letters", "signs", "ideogram"
TWO_BYTES = b"\xe0"  # what begins a letter of two bytes in UTF-8 lies below


def sort_of(letter: str) -> str:
    """Whether a letter belongs to a word, to a run of punctuation, or is written without spaces (Chinese, Japanese)."""
    if unicodedata.east_asian_width(letter) in "WF" and unicodedata.category(letter) == "Lo":
        return LETTERS if unicodedata.name(letter, "").startswith("HANGUL") else IDEOGRAM
    return LETTERS if unicodedata.category(letter)[0] in "LNM" or letter == "_" else SIGNS


def trimmed(text: str) -> str:
    """A word without the signs around it: byte pairs hold some together (-haired); signs alone stay."""
    text = text.strip()
    ends = [i for i, letter in enumerate(text) if sort_of(letter) != SIGNS]
    return text[ends[0] : ends[-1] + 1] if ends else text


@dataclass
class Growing:
    """A word in the making: its bytes so far."""

    content: bytes = b""

    def takes(self, more: bytes) -> bool:
        """Whether a piece goes on with this word instead of beginning one."""
        try:
            text = self.content.decode()
        except UnicodeDecodeError:
            return True  # the bytes of one letter in several pieces
        after = more.decode(errors="ignore")
        if not text.strip() or text[-1].isspace():
            return False
        if not after:  # half a letter: of two bytes in alphabets, of more where each stands for a word
            return sort_of(text[-1]) == LETTERS and more[:1] < TWO_BYTES
        sorts = sort_of(text[-1]), sort_of(after[0])
        return not after[0].isspace() and sorts[0] == sorts[1] != IDEOGRAM
