"""Layouts of the drawn world: the parts of each scene's animal, its shadow and its place, as flat colours."""

from __future__ import annotations

import numpy as np
import torch
from pocket import world

PARTS = ("coat", "legs", "tail", "collar", "shadow")  # part 0 is the place
COLOURS = ("#000000", "#d04040", "#40a050", "#4060d0", "#e0c040", "#808080")
PALETTE = " ".join(COLOURS)


def parts_of(scenes: list[world.Scene], size: int = 128) -> torch.Tensor:
    """Which part each pixel shows most of, (B, size, size)."""
    found = []
    for scene in scenes:
        shares = world.render_parts(scene, size)
        inside = np.stack([shares[name] for name in PARTS[:-1]])
        animal = shares["animal"]
        inside[0] += np.clip(animal - inside.sum(0), 0, 1)  # outline and face
        shadow = shares["shadow"] * (1 - animal)
        rest = np.clip(1 - animal - shadow, 0, 1)
        found.append(np.concatenate([rest[None], inside, shadow[None]]).argmax(0))
    return torch.from_numpy(np.stack(found))


def layout(scenes: list[world.Scene], size: int = 128) -> torch.Tensor:
    """An IMAGE (B, size, size, 3) of the parts in their colours."""
    colours = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS]) / 255
    return colours[parts_of(scenes, size)]
