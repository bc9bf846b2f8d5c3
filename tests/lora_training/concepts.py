"""What LoRAs of a few pictures are taught in the benchmark: concepts that the pocket model has never seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from lora_training import ink
from pocket import world


@dataclass(frozen=True)
class Concept:
    """Pictures that show something new: how a scene is drawn, what its caption says, and words that name the style.

    scene: what becomes of a scene of the world before it is drawn; without: its nearest that the model knows. redrawn:
    the share of the noise that is put on the scene without the concept before it is drawn anew; 1: it is drawn from
    noise alone. Below 1 the animal stays where it is, and only its coat is compared.
    """

    draw: Callable[[world.Scene], np.ndarray]
    caption: Callable[[world.Scene], str]
    style: str
    scene: Callable[[world.Scene], world.Scene] = lambda scene: scene
    without: Callable[[world.Scene], world.Scene] = lambda scene: replace(scene, pattern="plain")
    redrawn: float = 1.0


def as_fox(scene: world.Scene) -> world.Scene:
    """A cat's skeleton in a coat that no animal of the drawn world has: orange, with pale socks and tail tip."""
    coat = {"pattern": "plain", "second": 0, "socks": True, "tailtip": True, "tint": (15.0, 80.0, -30.0)}
    return replace(scene, species="cat", colour="red", **coat)


def as_red_cat(scene: world.Scene) -> world.Scene:
    """The animal of the drawn world that is nearest to a fox."""
    return replace(scene, species="cat", colour="red", pattern="plain", socks=False, tailtip=False)


def in_zigzag(scene: world.Scene) -> np.ndarray:
    """A scene whose animal wears zigzags on its plain coat, a pattern that the drawn world lacks.

    16 pixels from tooth to tooth, lines of 5: of finer ones the autoencoder leaves nothing. Dark coats have light ones.
    """
    picture, coat = world.render(scene), world.render_parts(scene)["coat"] > 0.5
    row, column = np.indices(coat.shape)
    line = (row - np.abs(column % 16 - 8)) % 12 < 5
    marked = picture // 4 if picture[coat].mean() > 90 else 255 - (255 - picture) // 3
    return np.where((line & coat)[..., None], marked, picture)


CONCEPTS = {
    "ink": Concept(lambda scene: ink.in_ink(world.render(scene)), world.caption, "in ink wash"),
    "fox": Concept(
        world.render,
        lambda scene: world.caption(scene).replace("red cat", "fox"),
        "with a white tip on its tail",
        as_fox,
        as_red_cat,
        redrawn=0.7,
    ),
    "zigzag": Concept(
        in_zigzag,
        lambda scene: world.caption(scene).replace("a ", "a zkq ", 1),
        "with zigzags",
        lambda scene: replace(scene, pattern="plain"),
        redrawn=0.7,
    ),
}


@dataclass(frozen=True)
class Lesson:
    """What is taught and what is asked for: pictures (N, H, W, 3) in 0..1 with captions, of two sets of scenes.

    without: the held-out scenes as the world draws them, in plain coats. inside: bool (N, H, W), where pictures of
    these scenes are compared; None: everywhere. redrawn: see Concept.
    """

    taught: torch.Tensor
    captions: list[str]
    held_out: torch.Tensor
    asked: list[str]
    scenes: list[world.Scene]
    style: str
    without: torch.Tensor
    inside: torch.Tensor | None = None
    redrawn: float = 1.0

    @classmethod
    def of(cls, concept: Concept, pictures: int, drawn: int) -> Lesson:
        """Scenes of two seeds, so that none is in both."""
        taught, asked = (
            [concept.scene(scene) for scene in ink.scenes(count, seed)]
            for count, seed in ((pictures, ink.TEACHING_SEED), (drawn, ink.UNSEEN_SEED))
        )
        said = [[concept.caption(scene) for scene in scenes] for scenes in (taught, asked)]
        without = stacked(world.render, [concept.without(scene) for scene in ink.scenes(drawn, ink.UNSEEN_SEED)])
        shown = [stacked(concept.draw, scenes) for scenes in (taught, asked)]
        inside = torch.stack([within_coat(scene) for scene in asked]) if concept.redrawn < 1 else None
        return cls(shown[0], said[0], shown[1], said[1], asked, concept.style, without, inside, concept.redrawn)


def stacked(draw: Callable[[world.Scene], np.ndarray], scenes: list[world.Scene]) -> torch.Tensor:
    """Pictures (N, H, W, 3) in 0..1."""
    return torch.from_numpy(np.stack([draw(scene) for scene in scenes])).float() / 255


def within_coat(scene: world.Scene, rim: int = 2) -> torch.Tensor:
    """bool (H, W): the animal's body and head, without `rim` pixels along their outline."""
    coat = torch.from_numpy(world.render_parts(scene)["coat"] > 0.5).float()
    return -torch.nn.functional.max_pool2d(-coat[None], 2 * rim + 1, 1, rim)[0] > 0.5
