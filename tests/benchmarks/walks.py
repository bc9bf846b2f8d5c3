"""Drawn walk cycles: an animal of the pocket world takes two steps across its half of the picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from pocket import world

SWING, LIFT, BOB = 0.17, 0.10, 0.02  # of a foot, along and up; of the whole animal: in units of its size
ACROSS = 0.06  # how far it comes, as a fraction of the picture's side


class Walker(world.Animal):
    """An animal whose feet are at a phase (0..1) of the walk; a frame of the clip."""

    def __init__(self, scene: world.Scene, canvas: world.Canvas, phase: float):
        self.phase = phase
        super().__init__(scene, canvas)

    def _collect(self) -> None:
        bones = self.bones
        legs = {
            name: [self.moved(stroke, shift + i / 2) for i, stroke in enumerate(getattr(bones, name))]
            for name, shift in (("hind_legs", 0.0), ("fore_legs", 0.25))
        }
        self.bones = replace(bones, **legs)
        super()._collect()

    def moved(self, stroke: world.Stroke, shift: float) -> world.Stroke:
        """A leg with its foot swung: back on the ground, forth in the air."""
        turn = 2 * np.pi * (self.phase + shift)
        hip, (x, y) = stroke
        return hip, (x + SWING * np.cos(turn), y + LIFT * max(0.0, np.sin(turn)))


def frames(scene: world.Scene, count: int) -> list[tuple[world.Scene, float]]:
    """(scene, phase) of every frame: the animal moves the way it looks."""
    shares = np.arange(count) / count
    return [
        (
            replace(
                scene,
                dx=scene.dx + scene.facing * ACROSS * float(share - 0.5),
                dy=scene.dy - BOB * scene.size * float(np.cos(4 * np.pi * share)),
            ),
            float(share),
        )
        for share in shares
    ]


def render(scene: world.Scene, phase: float, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """One frame, uint8 (size, size, 3), and the animal's mask: `world.render` with the legs of the phase."""
    canvas = world.Canvas(size)
    world.paint_background(canvas, scene)
    animal = Walker(scene, canvas, phase)
    canvas.multiply(1 - 0.3 * animal.shadow()[..., None])
    canvas.paint(animal.outline(), world.rgb(28, 24, 30), animal.pixel)
    for part in animal.parts:
        canvas.paint(part.distance, part.colour, animal.pixel)
    for distance, colour in animal.face():
        canvas.paint(distance, colour, animal.pixel)
    return canvas.image.clip(0, 255).round().astype(np.uint8), animal.mask().astype(np.float32)


def clip(scene: world.Scene, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (count, 128, 128, 3) in 0..1 and the animal's masks (count, 128, 128)."""
    pictures, masks = zip(*(render(*frame) for frame in frames(scene, count)), strict=True)
    return torch.from_numpy(np.stack(pictures)).float() / 255, torch.from_numpy(np.stack(masks))
