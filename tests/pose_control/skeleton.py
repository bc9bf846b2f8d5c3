"""A drawn animal's pose as a ControlNet is shown one: coloured sticks between joints on black, as OpenPose draws.

It tells where the animal stands, what its limbs do and which way it looks, and nothing of species, coat or place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from pocket import world
from torch import Tensor

STICK_RGB = {
    "spine": (255, 0, 0), "neck": (255, 120, 0), "head": (255, 255, 0), "near fore leg": (0, 255, 0),
    "far fore leg": (0, 160, 80), "near hind leg": (0, 160, 255), "far hind leg": (0, 60, 200), "tail": (200, 0, 255),
}  # fmt: skip
RADIUS, JOINT_RADIUS = 0.05, 0.075  # in units of the animal's size
JOINT_RGB = world.rgb(255, 255, 255)
MUZZLE = (0.34, -0.06)  # from the head's centre
REACH = 0.72  # of the body's long half axis: where the spine ends


def sticks(scene: world.Scene) -> Iterator[tuple[str, world.Stroke]]:
    """(name, stroke) back to front: looking right, y up, in units of the animal's size."""
    bones = world.skeleton(scene)
    x, y, rx, _, degrees = bones.body
    turn = np.radians(degrees)
    along = REACH * rx * np.cos(turn), REACH * rx * np.sin(turn)
    rump, shoulder, head = (x - along[0], y - along[1]), (x + along[0], y + along[1]), bones.head
    yield from (("tail", stroke) for stroke in zip(bones.tail, bones.tail[1:], strict=False))
    for legs, name in ((bones.hind_legs, "hind leg"), (bones.fore_legs, "fore leg")):
        named = zip(("near ", "far "), legs, strict=False)
        yield from ((side + name, stroke) for side, stroke in reversed(list(named)))
    yield "spine", (rump, shoulder)
    yield "neck", (shoulder, head)
    yield "head", (head, (head[0] + MUZZLE[0], head[1] + MUZZLE[1]))


def draw(scene: world.Scene, size: int = 128) -> np.ndarray:
    """The pose of a scene's animal, uint8 (size, size, 3)."""
    canvas, animal = world.Canvas(size), world.Animal(scene, world.Canvas(8))
    x = (canvas.x - animal.ground_x) * scene.facing / scene.size
    y = (animal.ground_y - canvas.y) / scene.size
    pixel = 1 / (size * scene.size)
    drawn = list(sticks(scene))
    for name, (start, end) in drawn:
        canvas.paint(world.capsule(x, y, start, end, RADIUS)[0], world.rgb(*STICK_RGB[name]), pixel)
    for joint in dict.fromkeys(point for _, stroke in drawn for point in stroke):
        canvas.paint(world.circle(x, y, *joint, JOINT_RADIUS), JOINT_RGB, pixel)
    return canvas.image.clip(0, 255).round().astype(np.uint8)


def pictures(scenes: Sequence[world.Scene], size: int = 128) -> Tensor:
    """IMAGE (B, size, size, 3) in 0..1 of the poses of scenes."""
    return torch.from_numpy(np.stack([draw(scene, size) for scene in scenes])).float() / 255
