"""Prompts limited to an area: the host samples a crop, in which the picture's masks and tokens must be found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Area:
    """Where a prompt limited to an area samples: height, width, top, left of the crop, and the whole latent's size."""

    height: int
    width: int
    top: int
    left: int
    whole: tuple[int, int]

    def tokens(self, grid: tuple[int, int], height: int, width: int) -> Tensor:
        """Indices of the tokens that a crop of height x width tokens covers, on the whole picture's grid of a layer."""
        top = min(round(self.top * grid[0] / self.whole[0]), grid[0] - height)
        left = min(round(self.left * grid[1] / self.whole[1]), grid[1] - width)
        rows, columns = torch.arange(top, top + height), torch.arange(left, left + width)
        return (rows[:, None] * grid[1] + columns).flatten()

    def crop(self, mask: Tensor) -> Tensor:
        """The part of a mask (pictures, h, w) of any size that lies in the area."""
        height, width = mask.shape[-2:]
        top, bottom = (round(y * height / self.whole[0]) for y in (self.top, self.top + self.height))
        left, right = (round(x * width / self.whole[1]) for x in (self.left, self.left + self.width))
        return mask[..., top : max(bottom, top + 1), left : max(right, left + 1)]


def area_of(numbers: Sequence[int], sides: tuple[int, ...]) -> Area:
    """What the host samples of a latent with these sides, (H, W) or (F, H, W), for a prompt's area: all lengths, then
    all starts. As the host takes them: fewer than the sides cover all frames, of more the first ones count.

    Raises ValueError where it covers some frames only.
    """
    half, count = len(numbers) // 2, len(sides)
    front = max(count - half, 0)
    lengths = [*sides[:front], *numbers[:half]][:count]
    starts = [*[0] * front, *numbers[half:]][:count]
    if count == 3 and (starts[0] > 0 or lengths[0] < sides[0]):
        raise ValueError(
            f"a prompt is limited to frames {starts[0]} to {min(starts[0] + lengths[0], sides[0])} of a latent of "
            f"{sides[0]}, where masks and maps are not served: set temporal to 1 and z to 0 in its area, or take our "
            "nodes out."
        )
    (height, width), (top, left), whole = lengths[-2:], starts[-2:], tuple(sides[-2:])
    return Area(min(height, whole[0] - top), min(width, whole[1] - left), top, left, whole)


def whole_grid(area: Area, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid that a layer has on the whole latent, from the one it has on an area's crop."""
    height, width = area.height, area.width
    whole = area.whole
    while (height, width) != grid and (height > grid[0] or width > grid[1]):
        height, width, whole = -(-height // 2), -(-width // 2), tuple(-(-side // 2) for side in whole)
    if (height, width) == grid:
        return whole
    sides = zip(area.whole, grid, (area.height, area.width), strict=True)
    return tuple(max(round(side * tokens / length), tokens) for side, tokens, length in sides)
