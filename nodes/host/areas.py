"""Prompts limited to an area: the host samples a crop, in which the picture's masks and tokens must be found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class NoteAreas:
    """CALC_COND_BATCH wrapper: note which prompts sample a crop of the latent, before the host forgets it."""

    name: str

    def __call__(
        self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict, **kwargs: Any
    ) -> Any:
        size = tuple(x.shape[-2:])
        found = {}
        for cond in (cond for group in conds if group is not None for cond in group if len(cond.get("area", ())) == 4):
            height, width, top, left = cond["area"]
            found[cond["uuid"]] = Area(min(height, size[0] - top), min(width, size[1] - left), top, left, size)
        if found:
            options = model_options.get("transformer_options", {}) | {self.name + ".areas": found}
            model_options = model_options | {"transformer_options": options}
        return executor(model, conds, x, timestep, model_options, **kwargs)


def whole_grid(area: Area, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid that a layer has on the whole latent, from the one it has on an area's crop."""
    height, width = area.height, area.width
    whole = area.whole
    while (height, width) != grid and (height > grid[0] or width > grid[1]):
        height, width, whole = -(-height // 2), -(-width // 2), tuple(-(-side // 2) for side in whole)
    if (height, width) == grid:
        return whole
    return tuple(max(round(side * g / a), g) for side, g, a in
                 zip(area.whole, grid, (area.height, area.width), strict=True))  # fmt: skip
