"""The drawn world in ink on paper: a style that the pocket model has never seen, for its LoRAs."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter
from pocket import world

PAPER, INK = np.array([0.95, 0.91, 0.82]), np.array([0.13, 0.12, 0.22])
TEACHING_SEED, UNSEEN_SEED = 7001, 7002
WASHES = 3  # tones of thinned ink


def in_ink(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 (H, W, 3) as a wash drawing: luminance in a few tones, and a brush line along edges."""
    grey = Image.fromarray(picture).convert("L").filter(ImageFilter.GaussianBlur(0.6))
    light = np.asarray(grey, dtype=np.float64) / 255
    across, down = np.gradient(light)
    line = np.clip(4.5 * np.hypot(across, down), 0, 1)
    wash = 0.45 * (1 - np.round(light * WASHES) / WASHES)
    ink = np.clip(wash + line, 0, 1)[..., None]
    return np.round(255 * (PAPER + ink * (INK - PAPER))).astype(np.uint8)


def scenes(count: int, seed: int = TEACHING_SEED) -> list[world.Scene]:
    return [world.sample_scene(np.random.default_rng([seed, number])) for number in range(count)]


def drawings(count: int, seed: int = TEACHING_SEED) -> tuple[np.ndarray, list[str]]:
    """(pictures float32 (count, H, W, 3) in 0..1, captions that name what is in them alone)."""
    found = scenes(count, seed)
    return np.stack([in_ink(world.render(scene)) for scene in found]).astype(np.float32) / 255, [
        world.caption(scene) for scene in found
    ]
