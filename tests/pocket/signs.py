"""Boards with letters for the pocket world: what is written on them, in which font, and where the letters are.

The fonts are subsets of two free ones, with only the letters used here: capitals of DejaVu Sans Bold and a few
characters of WenQuanYi Micro Hei (fonts/README.md). They lie beside this file, so that every machine draws the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHARACTERS = "大小山水火木日月人口天明春风国南北上下中花鸟石田"
# fmt: off
WORDS = {
    LETTERS: [
        "ZOO", "CAFE", "EXIT", "OPEN", "STOP", "PARK", "SHOP", "TAXI", "BUS", "HOTEL", "BANK", "POST",
        "TEA", "BAR", "NEWS", "SALE", "SLOW", "HOME", "ROOM", "HELLO", "BEACH", "MUSIC", "PIZZA", "CAT",
        "DOG", "BIRD", "FISH", "MILK", "SUN", "MOON", "SNOW", "LAKE", "YES", "NO", "OK",
    ],
    CHARACTERS: [
        "大山", "山水", "明月", "春风", "中国", "南国", "花鸟", "天上", "日月", "小花", "火山",
        "上山", "下水", "大国", "人口", "木石", "南山", "北国", "春天", "水田", "小鸟", "天下",
    ],
}
# fmt: on
FONTS = {
    LETTERS: Path(__file__).parent / "fonts" / "dejavu_sans_bold.ttf",
    CHARACTERS: Path(__file__).parent / "fonts" / "wqy_micro_hei.ttf",
}
REACH = {LETTERS: (0.73, 0.0), CHARACTERS: (0.86, 0.10)}  # of the letters above and below the baseline, in ems
BOARD_RGB = [  # board, letters
    ((250, 246, 232), (24, 22, 28)),
    ((248, 208, 72), (24, 22, 28)),
    ((30, 112, 74), (250, 250, 244)),
    ((34, 82, 164), (250, 250, 244)),
    ((62, 60, 68), (250, 236, 190)),
]
PIXEL = 1 / 128  # of the pictures that sizes are told for
SMALLEST, LARGEST = 20 * PIXEL, 32 * PIXEL  # letters
WIDEST = 0.74  # board
MARGIN = 0.28  # of the board around its letters, in ems
FINE = 4  # letters are drawn this much finer, then averaged


@dataclass(frozen=True)
class Sign:
    """A board with a line of letters. Lengths are fractions of the picture's side, y down."""

    text: str
    x: float  # the board's centre
    y: float
    width: float  # the board's
    height: float
    size: float  # of the letters: the font's em
    foot: float  # where its post meets the ground; on a wall a board needs no post
    board: int = 0  # index into BOARD_RGB


@dataclass(frozen=True)
class Line:
    """A line of text in a picture and the box around its letters: left, top, right, bottom, fractions of the side."""

    text: str
    box: tuple[float, float, float, float]


# ------------------------------------------------------------------------------------------------------------- texts


def alphabet_of(letter: str) -> str:
    for alphabet in FONTS:
        if letter in alphabet:
            return alphabet
    raise ValueError(f"sign: {letter!r} is not among the letters of the pocket world, {LETTERS} and {CHARACTERS}")


def is_held_out(text: str) -> bool:
    """Whether two neighbours are one of the pairs of letters (a ninth of all) that no training shows."""
    pairs = [(alphabet_of(a), a, b) for a, b in pairwise(text)]
    return any(b in known and (3 * known.index(a) + 5 * known.index(b)) % 9 == 0 for known, a, b in pairs)


def sample_text(rng: np.random.Generator, *, held_out: bool = False) -> str:
    """2 to 5 letters: a third of the texts are words; three in five are Latin. Only such as are held out, or not."""
    while True:
        alphabet = LETTERS if rng.random() < 0.6 else CHARACTERS
        if rng.random() < 1 / 3:
            text = WORDS[alphabet][int(rng.integers(len(WORDS[alphabet])))]
        else:
            text = "".join(alphabet[i] for i in rng.integers(0, len(alphabet), int(rng.integers(2, 6))))
        if is_held_out(text) == held_out and needed_width(text, SMALLEST) <= WIDEST:
            return text


# -------------------------------------------------------------------------------------------------------------- sizes


def text_width(text: str) -> float:
    """In ems."""
    return sum(_font(alphabet_of(letter), 1000).getlength(letter) for letter in text) / 1000


def needed_width(text: str, size: float) -> float:
    return (text_width(text) + 2 * MARGIN) * size


def reach(text: str) -> tuple[float, float]:
    """How far the letters reach above and below the baseline, in ems."""
    return tuple(max(REACH[alphabet_of(letter)][i] for letter in text) for i in range(2))


def make(text: str, size: float, **place) -> Sign:
    """A sign whose board fits its letters; `place`: x, y, foot, board."""
    above, below = reach(text)
    return Sign(text, size=size, width=needed_width(text, size), height=(above + below + 2 * MARGIN) * size, **place)


def rewrite(sign: Sign, text: str) -> Sign:
    """Another text on the same board, smaller where it has to be. Raises ValueError if it would be hard to read."""
    above, below = reach(text)
    size = min(
        sign.size, sign.width / (text_width(text) + 2 * MARGIN), sign.height / (above + below + 2 * MARGIN) + 1e-9
    )
    if size < 0.75 * SMALLEST:
        raise ValueError(
            f"sign: {text!r} would have letters of {size / PIXEL:.0f} px on a board made for {sign.text!r}; "
            f"choose a text of about {len(sign.text)} letters"
        )
    return replace(sign, text=text, size=size)


def row_of(sign: Sign) -> tuple[float, float, float, float]:
    """The row in which the letters stand, down to the baseline: left, top, right, bottom. Tails reach below it."""
    above, below = reach(sign.text)
    half, height = text_width(sign.text) * sign.size / 2, (above + below) * sign.size
    return sign.x - half, sign.y - height / 2, sign.x + half, sign.y + height / 2


def baseline_of(sign: Sign) -> float:
    return row_of(sign)[1] + reach(sign.text)[0] * sign.size


def line_of(sign: Sign) -> Line:
    left, _, right, _ = row_of(sign)
    inks = [_font(alphabet_of(letter), 1000).getbbox(letter, anchor="ls") for letter in sign.text]
    top, bottom = min(ink[1] for ink in inks), max(ink[3] for ink in inks)  # from the baseline, in thousandths of an em
    baseline = baseline_of(sign)
    return Line(sign.text, (left, baseline + top * sign.size / 1000, right, baseline + bottom * sign.size / 1000))


# ----------------------------------------------------------------------------------------------------------- drawing


def letters(sign: Sign, size: int) -> np.ndarray:
    """The letters' share of each pixel, float32 (size, size)."""
    from PIL import Image, ImageDraw

    side = size * FINE
    image = Image.new("L", (side, side))
    draw, x, baseline = ImageDraw.Draw(image), row_of(sign)[0] * side, baseline_of(sign) * side
    for letter in sign.text:
        font = _font(alphabet_of(letter), sign.size * side)
        draw.text((x, baseline), letter, fill=255, font=font, anchor="ls")
        x += text_width(letter) * sign.size * side
    fine = np.asarray(image, np.float32) / 255
    return fine.reshape(size, FINE, size, FINE).mean((1, 3))


@lru_cache(64)
def _font(alphabet: str, pixels: float):
    from PIL import ImageFont

    return ImageFont.truetype(str(FONTS[alphabet]), pixels, layout_engine=ImageFont.Layout.BASIC)


def clear_place(
    rng: np.random.Generator, masks: Iterable[np.ndarray], *, text: str, tries: int = 20
) -> tuple[Sign, float]:
    """A sign with this text whose letters the masks (N, N) leave free, and the share of their box that is hidden.

    Of `tries` random sizes and places the first free one, else the best.
    """
    hidden = np.maximum.reduce(list(masks))
    best, least = None, np.inf
    largest = min(LARGEST, WIDEST / needed_width(text, 1.0))
    board, foot = int(rng.integers(len(BOARD_RGB))), float(rng.uniform(0.71, 0.82))
    for _ in range(tries):
        sign = make(text, float(rng.uniform(SMALLEST, largest)), x=0.5, y=0.5, foot=foot, board=board)
        x = rng.uniform(sign.width / 2 + 0.01, 0.99 - sign.width / 2)
        y = rng.uniform(sign.height / 2 + 0.02, 0.46 - sign.height / 2)
        sign = replace(sign, x=float(x), y=float(y))
        left, top, right, bottom = (np.array(row_of(sign)) * len(hidden)).round().astype(int)
        covered = float(hidden[top:bottom, left:right].mean())
        if covered < least:
            best, least = sign, covered
        if covered == 0:
            break
    return best, least
