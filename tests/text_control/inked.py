"""A style beside exact text, as in the review paper's figure 15: a LoRA that draws in ink, and how much of it shows.

Its pictures are lora_training's drawings in ink, which have no signs; nothing of the text control is retrained. The
LoRA is for the narrow U-Net (benchmarks.pocket_host), and has a part for the text encoder, through which `*` is read.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_training import benchmark as fine_tuning
from lora_training import concepts, ink
from pocket import world
from safetensors.torch import load_file, save_file
from torch import Tensor

PICTURES, REPEATS, RATE = 35, 5, 5.0  # the rate is times the paper's 1e-4, and 1e-5 for the text encoder
LIKED = {"convolutions": True, "noise_offset": 0.1, "save_every": 0}  # with them the style shows in the most pictures


def file_of(folder: Path, steps: int) -> Path:
    """Where the LoRA of so many steps is kept."""
    return folder / f"text_ink_{steps}.safetensors"


def learned(pocket: tuple[Any, Any, Any], folder: Path, steps: int) -> Path:
    """The LoRA's file, trained by Train LoRA on (model, clip, vae) where the folder has none of so many steps."""
    path, epoch = file_of(folder, steps), PICTURES * REPEATS
    if path.is_file():
        return path
    if steps < epoch or steps % epoch:
        raise SystemExit(f"--lora-steps {steps} is no number of epochs: each has {epoch} steps.")
    recipe = argparse.Namespace(pictures=PICTURES, repeats=REPEATS, epochs=steps // epoch, rate=RATE)
    lesson = concepts.Lesson.of(concepts.CONCEPTS["ink"], PICTURES, 1)
    with tempfile.TemporaryDirectory() as temporary:
        teacher = fine_tuning.Pocket(*pocket, recipe, fine_tuning.in_folder(Path(temporary)))
        *_, written = teacher.teach(lesson, **LIKED)
        save_file(load_file(written[-1]), path)
    return path


def in_ink(scenes: Sequence[world.Scene]) -> Tensor:
    """The drawn scenes in ink, (n, H, W, 3) in 0..1."""
    return concepts.stacked(lambda scene: ink.in_ink(world.render(scene)), list(scenes))


def styled(pictures: Tensor, inked: Tensor, plain: Tensor) -> dict[str, float]:
    """ink: the share of pictures (n, H, W, 3) nearer to their drawing in ink than to the plain one; and the distance.

    Both as lora_training measures them.
    """
    triples = zip(pictures.split(1), inked.split(1), plain.split(1), strict=True)
    nearer = [fine_tuning.distance(found, new) < fine_tuning.distance(found, old) for found, new, old in triples]
    return {"ink": sum(nearer) / len(nearer), "distance": fine_tuning.distance(pictures, inked)}


def star_moved(plain: Any, changed: Any, cases: Sequence[Any]) -> float:
    """How far a LoRA's text encoder part moves what is read at ` * `, of its size; plain, changed: benchmark.Tools."""
    star, found = plain.clip.tokenize("*")["l"][0][1][0], []
    for case in cases:
        spoken = case.caption.replace(f'"{case.scene.sign.text}"', " * ")
        at = [token for token, _ in plain.clip.tokenize(spoken)["l"][0]].index(star)
        before, after = (tools.told(case, True)[0][0][0, at] for tools in (plain, changed))
        found.append(float((after - before).norm() / before.norm()))
    return sum(found) / len(found)
