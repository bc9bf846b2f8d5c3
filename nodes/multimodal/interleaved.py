"""Prompts of words and pictures: "a <image1> dog" taken apart, and its pictures made ready to be looked at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..colours import rgb
from ..quoting import quoted

# brackets, colons and commas also full-width, as people write them who write Chinese or Japanese
OPENING, CLOSING, COLON, COMMA = r"<{\uff1c\uff5b", r">}\uff1e\uff5d", r":\uff1a", r",\uff0c"
NAMED = r"(?:image|picture)[ _]?(?P<number>\d+)"
# <image1>, {image1}, <image 1:0.8>, <image1: 0.8, tokens=1296>; Picture 1, as the host's editing nodes say it
PLACEHOLDER = re.compile(
    rf"[{OPENING}]\s*{NAMED}\s*(?P<rest>[{COLON}{COMMA}][^{OPENING}{CLOSING}]*)?[{CLOSING}]", re.IGNORECASE
)
REST = re.compile(
    rf"(?:[{COLON}]\s*(?P<weight>[^{COMMA}]+?)\s*)?(?:[{COMMA}]\s*tokens\s*[=\uff1d]\s*(?P<tokens>\d+)\s*)?",
    re.IGNORECASE,
)
SPOKEN = re.compile(rf"(?<![A-Za-z0-9_]){NAMED}(?![A-Za-z0-9_])", re.IGNORECASE)
# what was meant as a placeholder and is none: no number, one bracket alone, another sign
ODD = re.compile(
    rf"[{OPENING}]\s*(?:image|picture)(?![A-Za-z])[^{OPENING}{CLOSING}]{{0,40}}[{CLOSING}]?"
    rf"|(?<![A-Za-z])(?:image|picture)[ _]?\d+[^{OPENING}{CLOSING}\s]{{0,20}}[{CLOSING}]",
    re.IGNORECASE,
)
# a weight behind a picture, not in its brackets: (image1:0.7), <image1>:0.7
OUTSIDE = re.compile(rf"\s*[{COLON}]\s*(?:[-+]?\d*[.\uff0e{COMMA}]\d+|[-+]?\d+\s*[)\uff09])")
WEIGHTS = (-4.0, 4.0)
MOST_PICTURES = 10  # in a prompt
HOW = "write <image1> for the first picture, <image1:0.8> to weaken it, or <image1, tokens=1296> to show more of it"


@dataclass(frozen=True)
class Placeholder:
    """A picture in a text: its number, its weight, and its tokens if the text says how many."""

    number: int
    weight: float = 1.0
    tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture (H, W, 3) in 0..1 to stand in a prompt as `tokens` tokens (None: the encoder's own number)."""

    pixels: Tensor
    tokens: int | None = None
    weight: float = 1.0
    name: str = "picture"


Prompt = tuple[str | Picture, ...]  # text and pictures in the order in which they are read


def parse(text: str) -> tuple[str | Placeholder, ...]:
    """Text and placeholders of pictures, in order. Raises ValueError for a placeholder that cannot be read.

    In a text without placeholders, "Picture 1" and "image 1" name pictures, too: that is how the host's own editing
    nodes number them.
    """
    pattern = PLACEHOLDER if PLACEHOLDER.search(text) else SPOKEN
    if pattern is SPOKEN:
        refuse_odd(text)
    parts: list[str | Placeholder] = []
    end = 0
    for found in pattern.finditer(text):
        outside = OUTSIDE.match(text, found.end())
        if outside:
            raise ValueError(
                f"the weight in {quoted(text[found.start() : outside.end()])} stands outside of the brackets: write it "
                "inside, with a point, as in <image1:0.8>."
            )
        parts += [text[end : found.start()], read_placeholder(found)]
        end = found.end()
    parts = [part for part in (*parts, text[end:]) if part != ""]
    for part in parts:
        if isinstance(part, str):
            refuse_odd(part)
    return tuple(parts)


def refuse_odd(text: str) -> None:
    """Raise ValueError where words of a text were meant as a placeholder: they would be read as words in silence."""
    odd = ODD.search(text)
    if odd:
        raise ValueError(f"{quoted(odd.group())} names no picture: {HOW}.")


def read_placeholder(found: re.Match) -> Placeholder:
    """What one placeholder says. Raises ValueError for a weight, a number of tokens or of a picture that is none."""
    rest = REST.fullmatch(found.groupdict().get("rest") or "")
    try:
        weight, tokens = rest["weight"], rest["tokens"]
        read = Placeholder(int(found["number"]), float(weight or 1.0), int(tokens) if tokens else None)
    except (TypeError, ValueError) as error:  # TypeError: more stands there than a weight and tokens
        raise ValueError(
            f"{quoted(found.group())} cannot be read: write a weight with a point, as in <image1:0.8>, and tokens as "
            "in <image1:0.8, tokens=576>."
        ) from error
    if not WEIGHTS[0] <= read.weight <= WEIGHTS[1]:
        raise ValueError(
            f"the weight in {quoted(found.group())} must be from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}: 1 shows the picture "
            "as it is, 0 takes it out."
        )
    if not 1 <= read.number <= MOST_PICTURES:
        raise ValueError(f"{quoted(found.group())} names no picture: they are numbered from 1 to {MOST_PICTURES}.")
    return read


def placeholders(parts: Iterable[str | Placeholder]) -> list[Placeholder]:
    """The placeholders among the parts."""
    return [part for part in parts if isinstance(part, Placeholder)]


def fill(texts: Mapping[str, str], pictures: Mapping[int, Tensor]) -> dict[str, Prompt]:
    """The prompts of some texts, with their pictures (H, W, 3) in place of their names.

    Raises ValueError for a picture that a text names and nobody connected, and for one that no text names.
    """
    parsed = {name: parse(text) for name, text in texts.items()}
    require_each(parsed, pictures)

    def put(part: str | Placeholder) -> str | Picture:
        if isinstance(part, str):
            return part
        return Picture(pictures[part.number], part.tokens, part.weight, f"image{part.number}")

    return {name: tuple(map(put, parts)) for name, parts in parsed.items()}


def require_each(parsed: Mapping[str, Sequence[str | Placeholder]], pictures: Mapping[int, Tensor]) -> None:
    """Raise ValueError unless every picture that a text names is connected, and every connected one is named."""
    named = {part.number for parts in parsed.values() for part in placeholders(parts)}
    for name, parts in parsed.items():
        missing = sorted({part.number for part in placeholders(parts)} - pictures.keys())
        if missing:
            have = ", ".join(f"image{number}" for number in sorted(pictures)) or "no picture"
            raise ValueError(
                f"the {name} names <image{missing[0]}>, and {have} is connected: connect a picture to "
                f"images.image{missing[0]}, or take it out of the {name}."
            )
    unused = sorted(pictures.keys() - named)
    if unused:
        raise ValueError(
            f"image{unused[0]} is connected and no text names it: write <image{unused[0]}> where it belongs, as in "
            f"'a <image{unused[0]}> dog', or disconnect it."
        )


def words_only(text: str) -> str:
    """A text without its pictures, for encoders that read words."""
    return " ".join(" ".join(part for part in parse(text) if isinstance(part, str)).split())


def with_tokens(prompt: Prompt, tokens: int) -> Prompt:
    """The prompt with so many tokens for every picture whose placeholder says none."""
    return tuple(
        replace(part, tokens=tokens) if isinstance(part, Picture) and part.tokens is None else part for part in prompt
    )


# ---- pictures -------------------------------------------------------------------------------------------------------


def numbered(images: Mapping[str, Tensor], masks: Mapping[str, Tensor], remove: bool) -> dict[int, Tensor]:
    """Pictures (H, W, 3) by number from inputs named image1, mask1, ...; sockets with nothing on them are left out.

    A masked picture is cut out; see cut_out. Raises ValueError for a mask without a picture.
    """
    found = {number_in(name, "image"): single(image, name) for name, image in images.items() if image is not None}
    for name, mask in ((name, mask) for name, mask in masks.items() if mask is not None):
        number = number_in(name, "mask")
        if number not in found:
            raise ValueError(f"{name} has no picture: connect images.image{number}, or disconnect the mask.")
        found[number] = cut_out(found[number], mask, f"image{number}", remove)
    return found


def number_in(name: str, kind: str) -> int:
    """The number of an input named image1 or mask1. Raises ValueError for one that no prompt can name."""
    number = name.removeprefix(kind)
    if not re.fullmatch("[1-9][0-9]?", number) or int(number) > MOST_PICTURES:
        raise ValueError(f"{quoted(name)} is no input: they are {kind}1 to {kind}{MOST_PICTURES}.")
    return int(number)


def single(image: Tensor, name: str) -> Tensor:
    """The one picture of an IMAGE, (H, W, 3) in float32. Raises ValueError for a batch, and as `rgb`."""
    colours = rgb(image, name)
    if len(colours) != 1:
        raise ValueError(
            f"{name} holds {len(colours)} pictures and stands for one: take one out of the batch with Get Image or "
            "Mask Range From Batch."
        )
    return colours[0].float().clamp(0, 1)


def cut_out(picture: Tensor, mask: Tensor, name: str, remove: bool) -> Tensor:
    """The part of a picture (H, W, 3) in the box around a mask (1, h, w), all else black if `remove`.

    The mask is brought to the picture's size; its box is where it is 0.5 or more. Raises ValueError for an empty mask.
    """
    height, width = picture.shape[:2]
    if mask.ndim < 2 or mask.numel() == 0 or not torch.isfinite(mask).all():
        raise ValueError(f"the mask of {name} has no pixels, or NaN in them: look at the node that makes it.")
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if len(mask) != 1:
        raise ValueError(f"the mask of {name} holds {len(mask)} masks and stands for one: take one out of the batch.")
    weight = F.interpolate(mask.clamp(0, 1), size=(height, width), mode="bilinear", antialias=True)[0, 0]
    rows, columns = ((weight >= 0.5).any(axis).nonzero()[:, 0] for axis in (1, 0))
    if len(rows) == 0:
        raise ValueError(f"the mask of {name} is empty: paint the part of the picture to show, or disconnect it.")
    shown = picture * weight[..., None] if remove else picture
    return shown[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def squared(picture: Tensor, side: int) -> Tensor:
    """A picture (H, W, 3) padded to a square with black, at side x side pixels in -1..1: (1, 3, side, side).

    arXiv:2406.18790, section 5: "All images were padded to square resolutions with black pixels", and "resized up or
    down to meet their target resolution". -1..1 is what SigLIP, the vision tower of most families, was trained on.
    """
    height, width = picture.shape[:2]
    longest = max(height, width)
    top, left = (longest - height) // 2, (longest - width) // 2
    padded = F.pad(picture.movedim(-1, 0)[None], (left, longest - width - left, top, longest - height - top))
    small = F.interpolate(padded, size=(side, side), mode="bilinear", antialias=True)
    return small.clamp(0, 1) * 2 - 1
