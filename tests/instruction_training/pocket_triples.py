"""Triples of the drawn world: a scene, an instruction, plain or vague, and the ideal edit; encoded in parts."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pocket import autoencoder, world

TRAINING_SEED, HELD_OUT_SEED = 8101, 8102
PART = 256  # triples encoded into one file
CALM, QUICK = ("sitting", "lying"), ("running", "jumping")


@dataclass(frozen=True)
class Triple:
    """A scene, what is asked for, and the scene it becomes. vague: what comes of it, the picture or the world knows."""

    source: world.Scene
    instruction: str
    edited: world.Scene
    vague: bool

    @property
    def expressed(self) -> str:
        """The result in words: what a multimodal model is to make of picture and instruction."""
        return world.caption(self.edited)


# ------------------------------------------------------------------------------------------------------- instructions

Ask = Callable[[world.Scene, np.random.Generator], tuple[str, dict[str, str]] | None]  # None: not of this scene
NOUNS = {"park": "the park", "beach": "the beach", "snow": "the snow", "night": "the night", "room": "a room"}


def other(values: list[str], but: str, rng: np.random.Generator) -> str:
    """Another value."""
    left = [value for value in values if value != but]
    return left[int(rng.integers(len(left)))]


def one_of(texts: tuple[str, ...], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]


def repaint(scene: world.Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    colour = other(world.COLOURS, scene.colour, rng)
    return one_of(("paint it {}", "make it {}", "make the {species} {}"), rng).format(colour, species=scene.species), {
        "colour": colour
    }


def repose(scene: world.Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    pose = other(world.POSES, scene.pose, rng)
    return one_of(("let it be {}", "show it {}", "make the {species} be {}"), rng).format(
        pose, species=scene.species
    ), {"pose": pose}


def replace_place(scene: world.Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    place = other(world.PLACES, scene.place, rng)
    return one_of(("put it into {}", "take it to {}", "change the place to {}"), rng).format(NOUNS[place]), {
        "place": place
    }


def reside(scene: world.Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    side = other(world.SIDES, scene.side, rng)
    return one_of(("move it to the {}", "put the {species} on the {}"), rng).format(side, species=scene.species), {
        "side": side
    }


def become(scene: world.Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    species = other(world.SPECIES, scene.species, rng)
    return one_of(("turn it into a {}", "make it a {}"), rng).format(species), {"species": species}


PLAIN: tuple[Ask, ...] = (repaint, repose, repose, replace_place, reside, become)


def vaguely(texts: tuple[str, ...], attribute: str, value: str) -> Ask:
    """Instructions that name no result, which is one value of an attribute; not of a scene that has it already."""

    def ask(scene: world.Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]] | None:
        return None if getattr(scene, attribute) == value else (one_of(texts, rng), {attribute: value})

    return ask


def elsewhere(scene: world.Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """Only the picture tells which side the other one is."""
    side = other(world.SIDES, scene.side, rng)
    return one_of(("move it to the other side", "it should stand on the opposite side"), rng), {"side": side}


VAGUE: tuple[Ask, ...] = (
    elsewhere,
    elsewhere,
    vaguely(("let it rest", "it is tired", "let it sleep"), "pose", "lying"),
    vaguely(("it is in a hurry", "it is late", "something chases it"), "pose", "running"),
    vaguely(("it is full of joy", "let it catch a fly"), "pose", "jumping"),
    vaguely(("make it winter", "let it be cold"), "place", "snow"),
    vaguely(("bring it inside", "it starts to rain, bring it home"), "place", "room"),
    vaguely(("turn off the sun", "it is past midnight"), "place", "night"),
    vaguely(("give it a holiday at the sea", "it wants to swim"), "place", "beach"),
)


def triple(index: int, seed: int = TRAINING_SEED) -> Triple:
    """One triple, half of them vague. The scenes of another seed are held out."""
    rng = np.random.default_rng([seed, index])
    scene, vague = world.sample_scene(rng), bool(rng.random() < 0.5)
    asks, asked = (VAGUE if vague else PLAIN), None
    while asked is None:
        asked = asks[int(rng.integers(len(asks)))](scene, rng)
    return Triple(scene, asked[0], world.edit(scene, **asked[1]), vague)


def held_out(count: int) -> list[Triple]:
    """Triples that no training sees."""
    return [triple(index, HELD_OUT_SEED) for index in range(count)]


# ------------------------------------------------------------------------------------------------------------ latents


def encode(work: Path, count: int, processes: int) -> np.ndarray:
    """Latents float16 (count, 2, 4, 16, 16) of sources and results as the autoencoder gives them.

    Parts of 256 are kept in work/triples: an interrupted run goes on, and more can be added later.
    """
    folder = work / "triples"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {low: folder / f"{low:06d}.npy" for low in range(0, count, PART)}
    jobs = [(part, low) for low, part in parts.items() if not part.exists()]
    if jobs:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.starmap(encode_part, jobs, chunksize=1)
    return np.concatenate([np.load(part) for part in parts.values()])[:count]


def encode_part(part: Path, low: int) -> None:
    torch.set_num_threads(1)
    latents = encoded([triple(index) for index in range(low, low + PART)])
    temporary = part.with_suffix(".part.npy")
    np.save(temporary, latents.half().numpy())
    os.replace(temporary, part)
    print(f"triples {low} to {low + PART - 1} encoded", flush=True)


def encoded(triples: list[Triple], batch: int = 8) -> torch.Tensor:
    """Latents float32 (n, 2, 4, 16, 16)."""
    model, out = autoencoder.load(autoencoder.WEIGHTS, "cpu"), []
    for start in range(0, len(triples), batch):
        scenes = [scene for each in triples[start : start + batch] for scene in (each.source, each.edited)]
        pictures = torch.from_numpy(np.stack([world.render(scene) for scene in scenes])).movedim(-1, 1) / 255
        with torch.no_grad(), autoencoder.autocast("cpu"):
            out.append(model.encode(pictures.contiguous(memory_format=torch.channels_last)).float().cpu())
    return torch.cat(out).unflatten(0, (-1, 2))
