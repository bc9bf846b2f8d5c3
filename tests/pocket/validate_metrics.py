"""Does `metrics.identity` measure identity? Scores pictures whose answer is known; prints the table of README.md.

    python tests/pocket/validate_metrics.py [--scenes 64] [--cache pictures.npz]

Each held-out scene gets another pose. The ideal edit is drawn as it should be, displaced, and with one or all things
wrong; every picture goes through the autoencoder first, as an edited picture does.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if __package__:
    from . import autoencoder as autoencoding
    from . import judge as judging
    from . import metrics, world
else:
    import autoencoder as autoencoding
    import judge as judging
    import metrics
    import world

BACKGROUND = ("horizon", "prop", "prop_s", "bgtint")
RIGHT = ("ideal", "displaced")


def ideal_scenes(n: int) -> list[world.Scene]:
    """`n` held-out scenes, each with another pose than it had."""
    scenes = world.held_out_scenes(n)
    turns = (world.POSES.index(scene.pose) + 1 + i % 4 for i, scene in enumerate(scenes))
    return [world.edit(s, pose=world.POSES[turn % 5]) for s, turn in zip(scenes, turns, strict=True)]


def variants(ideal: world.Scene, rng: np.random.Generator, pixels: int = 6) -> dict[str, world.Scene]:
    """The ideal edit and what may come out instead; names as in the table."""
    step_x, step_y = rng.integers(-pixels, pixels + 1, 2) / 128
    captioned = {name: getattr(ideal, name) for name in world.CAPTIONED}
    stranger = world.sample_scene(rng, **captioned)
    stranger = replace(stranger, **{name: getattr(ideal, name) for name in BACKGROUND})
    pattern = world.PATTERNS[(world.PATTERNS.index(ideal.pattern) + int(rng.integers(1, 4))) % 4]
    return {
        "ideal": ideal,
        "displaced": world.edit(ideal, dx=ideal.dx + step_x, dy=ideal.dy + step_y),
        "other coat": world.edit(ideal, pattern=pattern),
        "plain coat": world.edit(ideal, pattern="plain", socks=False, tailtip=False),
        "other collar": world.edit(ideal, collar=(ideal.collar + int(rng.integers(1, 6))) % 6),
        "looks the other way": world.edit(ideal, facing=-ideal.facing),
        "stranger": stranger,
    }


def draw(n: int, seed: int = 0) -> tuple[list[world.Scene], dict[str, Tensor]]:
    """Ideal scenes and the pictures of each variant, float (n, 128, 128, 3)."""
    ideals, rng = ideal_scenes(n), np.random.default_rng(seed)
    drawn = [{name: world.render(s) for name, s in variants(ideal, rng).items()} for ideal in ideals]
    return ideals, {name: metrics.to_float(np.stack([d[name] for d in drawn])) for name in drawn[0]}


def auc(right: Tensor, wrong: Tensor) -> float:
    """The chance that a random right picture scores higher than a random wrong one."""
    difference = right[:, None] - wrong[None]
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


def table(judge: judging.Judge, ideals: list[world.Scene], pictures: dict[str, Tensor]) -> str:
    """A markdown table: means of each number, and the AUC of the right pictures against each kind of wrong one."""
    scores = {name: metrics.identity(judge, images, ideals) for name, images in pictures.items()}
    columns = ["score", "hidden", "palette", *metrics.IDENTITY]
    right = torch.cat([scores[name]["score"] for name in RIGHT])
    lines = ["| picture | " + " | ".join(columns) + " | AUC |", "|---|" + "---|" * (len(columns) + 1)]
    for name, score in scores.items():
        cells = [f"{score[column].nanmean().item():.2f}" for column in columns]
        cells.append("" if name in RIGHT else f"{auc(right, score['score']):.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--autoencoder", type=Path, default=autoencoding.WEIGHTS)
    parser.add_argument("--judge", type=Path, default=judging.WEIGHTS)
    parser.add_argument("--cache", type=Path, help="keep the decoded pictures here (.npz) and use them if there")
    options = parser.parse_args()
    if options.cache and options.cache.exists():
        pictures = {name: torch.from_numpy(value) for name, value in np.load(options.cache).items()}
        ideals = ideal_scenes(options.scenes)
    else:
        ideals, pictures = draw(options.scenes)
        model = autoencoding.load(options.autoencoder)
        pictures = {name: autoencoding.round_trip(model, images) for name, images in pictures.items()}
        if options.cache:
            np.savez(options.cache, **{name: (value * 255).round().byte().numpy() for name, value in pictures.items()})
    print(table(judging.load(options.judge), ideals, pictures))


if __name__ == "__main__":
    main()
