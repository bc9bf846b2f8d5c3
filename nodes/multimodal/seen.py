"""A prompt as its encoder is given it, as a picture: every word's tokens, every picture as it is seen, what counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import plots
from .interleaved import Picture, Prompt, squared
from .vlm import Span, VisionLanguage

WIDTH, MARGIN, GAP = 740, 14, 5
LINE, CHIP, CELL = 18, 22, 232  # heights of a line, of a token, and of a picture, in pixels
MOST_CHIPS = 300  # tokens of text that are written out in a prompt
MOST_LETTERS = 40  # of one token
ORANGE, PALE, PALE_GREY = (222, 140, 50), (222, 233, 246), (232, 232, 232)


# ---- what is shown --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A token of text. special: none that was written, such as the one that begins a text."""

    text: str
    special: bool

    def size(self, canvas: plots.Canvas) -> tuple[int, int]:
        """Width and height."""
        return int(canvas.length(self.text)) + 12, CHIP

    def draw(self, canvas: plots.Canvas, left: int, top: int) -> None:
        """A chip with its text."""
        width, height = self.size(canvas)
        box = (left, top, left + width, top + height)
        canvas.bar(box, PALE_GREY if self.special else PALE)
        canvas.frame(box, plots.GREY if self.special else plots.BLUE)
        canvas.text((left + 6, top + 3), self.text, plots.GREY if self.special else plots.INK)


@dataclass(frozen=True, eq=False)
class Looked:
    """A picture as the encoder sees it: under the grid of its tokens, with a frame around what is no padding.

    count: its tokens without those around it; grid: tokens along a side, 0 where they lie in none (a perceiver's).
    """

    picture: Picture
    side: int
    count: int
    grid: int

    def lines(self) -> tuple[str, ...]:
        """What is written under it."""
        height, width = self.picture.pixels.shape[:2]
        weight = self.picture.weight
        counts = "" if weight == 1.0 else f", weight {weight:g}" + (" (left out)" if weight == 0.0 else "")
        cut = f"{width} x {height}" + ("" if width == height else f", padded to {max(width, height)}")
        return f"{self.picture.name}: {self.count} tokens{counts}", f"{cut}, seen at {self.side} px"

    def size(self, canvas: plots.Canvas) -> tuple[int, int]:
        """Width and height."""
        return max(CELL, *(int(canvas.length(line)) for line in self.lines())), CELL + 4 + LINE * len(self.lines())

    def draw(self, canvas: plots.Canvas, left: int, top: int) -> None:
        """The picture, its grid, its frame, and the lines under it."""
        shown = (squared(self.picture.pixels.cpu(), self.side)[0].movedim(0, -1) + 1) / 2
        if self.side < CELL:  # its pixels, not their blur
            nearest = torch.arange(CELL) * self.side // CELL
            shown = shown[nearest][:, nearest]
        canvas.picture((left, top), shown, (CELL, CELL))
        for i in range(1, self.grid):
            at = round(i * CELL / self.grid)
            canvas.line([(left + at, top), (left + at, top + CELL - 1)], plots.GREY)
            canvas.line([(left, top + at), (left + CELL - 1, top + at)], plots.GREY)
        canvas.frame(self.content(left, top), ORANGE, width=2)
        for number, line in enumerate(self.lines()):
            canvas.text((left, top + CELL + 3 + number * LINE), line)

    def content(self, left: int, top: int) -> plots.Box:
        """The box of what is no padding."""
        height, width = self.picture.pixels.shape[:2]
        across, down = (math.ceil(CELL * each / max(height, width)) for each in (width, height))
        x, y = left + (CELL - across) // 2, top + (CELL - down) // 2
        return x, y, x + across - 1, y + down - 1


Item = Word | Looked


@dataclass(frozen=True)
class Shown:
    """A prompt to be shown: its title, what is drawn, its tokens (True: a picture's), tokens it is brought to.

    left_out: tokens at the end of a repetition that do not count.
    """

    title: str
    items: tuple[Item, ...]
    kinds: tuple[bool, ...]
    length: int

    @property
    def left_out(self) -> int:
        """Tokens of a repetition that is cut off."""
        return self.length % len(self.kinds)


def shown(vlm: VisionLanguage, name: str, prompt: Prompt, length: int) -> Shown:
    """A prompt as it is shown; length: tokens that it is repeated to."""
    ids, spans = vlm.tokenised(prompt)
    items = list(items_of(vlm, ids, spans))
    words = [place for place, item in enumerate(items) if isinstance(item, Word)]
    if len(words) > MOST_CHIPS:
        last = words[MOST_CHIPS]
        pictures = [item for item in items[last:] if isinstance(item, Looked)]
        items = [*items[:last], Word(f"... {len(words) - MOST_CHIPS} more", True), *pictures]
    kinds = tuple(span.picture is not None for span in spans for _ in range(span.tokens))
    many = "1 token" if len(ids) == 1 else f"{len(ids)} tokens"
    return Shown(f"{name}: {many} of {vlm.limit}", tuple(items), kinds, length)


def items_of(vlm: VisionLanguage, ids: Sequence[int], spans: Sequence[Span]) -> Iterator[Item]:
    """Every token of text, and every picture between those that go around it."""
    image = vlm.tokenizer.convert_tokens_to_ids(vlm.family.image)
    for span in spans:
        inside = ids[span.start : span.end]
        around = [token for token in inside if token != image]
        first = inside.index(image) if image in inside else len(inside)
        shows = span.picture is not None
        yield from (word(vlm, token, shows) for token in around[:first])
        if shows:
            count = inside.count(image)
            grid = 0 if vlm.perceiver else math.isqrt(count)
            yield Looked(span.picture, span.side, count, grid)
        yield from (word(vlm, token, shows) for token in around[first:])


def word(vlm: VisionLanguage, token: int, around: bool) -> Word:
    """A token as it reads. around: it is one of those before and behind a picture."""
    special = around or token in vlm.tokenizer.all_special_ids
    text = vlm.tokenizer.decode([token]).replace("\n", "\\n").strip()
    return Word(text[:MOST_LETTERS] or "_", special)


# ---- the drawing ----------------------------------------------------------------------------------------------------


def layout_picture(vlm: VisionLanguage, prompts: dict[str, Prompt], length: int) -> Tensor:
    """IMAGE (1, H, W, 3) of prompts by their names, one below the other."""
    parts = [shown(vlm, name, prompt, length) for name, prompt in prompts.items()]
    measure = plots.Canvas.blank(1, 1)
    placed = [list(flow(part.items, measure)) for part in parts]
    heights = [max(top + height for _, _, top, height in each) for each in placed]
    canvas = plots.Canvas.blank(WIDTH, sum(heights) + len(parts) * (3 * LINE + 4 * GAP + MARGIN) + MARGIN)
    top = MARGIN
    for part, each, height in zip(parts, placed, heights, strict=True):
        canvas.text((MARGIN, top), part.title)
        top += LINE + GAP
        for item, left, down, _ in each:
            item.draw(canvas, left, top + down)
        top += height + 2 * GAP
        draw_bar(canvas, top, part)
        top += 2 * LINE + GAP + MARGIN
    return canvas.done()


def flow(items: Sequence[Item], measure: plots.Canvas) -> Iterator[tuple[Item, int, int, int]]:
    """(item, left, top, height) of items in lines, as text flows."""
    left, top, line = MARGIN, 0, 0
    for item in items:
        width, height = item.size(measure)
        if left + width > WIDTH - MARGIN and left > MARGIN:
            left, top, line = MARGIN, top + line + GAP, 0
        yield item, left, top, height
        left, line = left + width + GAP, max(line, height)


def draw_bar(canvas: plots.Canvas, top: int, part: Shown) -> None:
    """All tokens that the sampler is given, from left to right: text, pictures, repetitions, what does not count."""
    wide, colours = WIDTH - 2 * MARGIN, []
    for i in range(part.length):
        again = i >= len(part.kinds)
        kept = i < part.length - part.left_out
        colours.append((plots.SOFT if again else ORANGE if part.kinds[i] else plots.BLUE) if kept else plots.WHITE)
    begin = 0
    for i in range(1, len(colours) + 1):
        if i == len(colours) or colours[i] != colours[begin]:
            x, end = (MARGIN + round(each / len(colours) * wide) for each in (begin, i))
            canvas.bar((x, top, max(x, end - 1), top + LINE - 4), colours[begin])
            begin = i
    canvas.frame((MARGIN, top, MARGIN + wide, top + LINE - 4), plots.GREY)
    canvas.text((MARGIN, top + LINE), bar_text(part))


def bar_text(part: Shown) -> str:
    """What the bar shows."""
    pictures = sum(part.kinds)
    said = f"to the sampler: {len(part.kinds) - pictures} of text (blue), {pictures} of pictures (orange)"
    if part.length > len(part.kinds):
        said += f", repeated to {part.length} (grey)"
    return said + (f", the last {part.left_out} do not count (white)" if part.left_out else "")
