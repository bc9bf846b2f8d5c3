"""The lessons of a training, one after the other: which step is which, and what learns in each.

align  The connector learns to say of each word what the text encoder says, of each picture what that says of the words
       to which the picture is bound. No U-Net, no noise. A LoRA of the language model learns along.
read   The U-Net's LoRA alone learns to read such tokens, as a connector would say them that made no mistake.
draw   All that is trained learns by the denoising loss. The paper has this lesson alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ALIGN, READ, DRAW = "align", "read", "draw"
LEARNERS = {ALIGN: ("network", "language"), READ: ("unet",), DRAW: ("network", "unet", "language")}


@dataclass(frozen=True)
class Course:
    """Steps of the first two lessons, counted from the beginning of a training; all steps behind them draw."""

    align: int = 0
    read: int = 0

    @property
    def before_drawing(self) -> int:
        """Steps of the lessons that come before the last."""
        return self.align + self.read

    def named(self) -> dict[str, int]:
        """The steps of lessons that come before the last, by the ids of their inputs; nothing where there are none."""
        return {"align_steps": self.align, "read_steps": self.read} if self.before_drawing else {}

    def lesson(self, step: int) -> str:
        """The lesson of a step."""
        return ALIGN if step < self.align else READ if step < self.before_drawing else DRAW

    def begin(self, step: int) -> int:
        """The first step of the lesson that a step belongs to."""
        return {ALIGN: 0, READ: self.align, DRAW: self.before_drawing}[self.lesson(step)]

    def behind(self, step: int, end: int) -> int:
        """The step behind the last of the lesson that a step belongs to, in a training up to `end`."""
        return {ALIGN: self.align, READ: self.before_drawing, DRAW: end}[self.lesson(step)]

    def end(self, before: int, steps: int) -> int:
        """The step behind the last of a training that goes on after `before`: first what is missing, then `steps`."""
        return max(before, self.before_drawing) + steps

    def parts(self, begin: int, end: int, most: int) -> Iterator[range]:
        """Steps begin..end, at most so many at a time, and none of two lessons."""
        while begin < end:
            ends = [bound for bound in (self.align, self.before_drawing, end) if bound > begin]
            part = range(begin, min(begin + most, *ends, end))
            yield part
            begin = part.stop
