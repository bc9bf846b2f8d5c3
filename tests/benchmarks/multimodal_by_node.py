"""The pocket multimodal encoder trained by the node alone: the lessons of Train Multimodal Encoder on drawn scenes.

No lesson here is the benchmark's own, and nothing is told but a caption a picture. What the table's captions leave to
vectors of a dictionary (multimodal_pocket.Dictionary) these captions say: "a red spots cream pink rightward dog sitting
on the left in the park", and the animal cut out is bound to all of "red ... dog". The vision-language model is the one
that was trained to see, as a user's has seen the world before. Import pocket_host first and call its import_host().
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.multimodal_learning import fast
from benchmarks.multimodal_pocket import CONNECTOR, LORA, TRAINING_SEED, VLM, Lesson, painted
from palimpsest.kernels.lora import COSINE
from palimpsest.nodes.multimodal import dataset as interleaved_dataset
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal.encoder import MultimodalEncoder
from palimpsest.nodes.multimodal.interleaved import Picture, Prompt
from palimpsest.nodes.multimodal.training import training as multimodal_training
from palimpsest.nodes.multimodal.training.learner import Snapshot
from palimpsest.nodes.multimodal.training.saying import Speaker, shared_out
from palimpsest.nodes.multimodal.training.settings import SNR_PLUS_1, TrainSettings
from palimpsest.nodes.multimodal.vlm import Hidden, load_vlm
from palimpsest.nodes.training import Watch
from pocket import checkpoint, judge, world
from safetensors.torch import load_file, save_file
from torch import Tensor

SHIPPED = Path(__file__).resolve().parent.parent / "pocket" / "models"
STATE = "node_state.safetensors"
TOKENS = 64
# The presets' values are those of large models; these are the pocket's, as Recipe has them for the four lessons.
VALUES = {
    "tokens": TOKENS, "batch_size": 8, "depth": 1, "lora_rank": 16, "train_unet": True, "align_rate": 1e-3,
    "read_rate": 1e-3, "connector_rate": 1e-4, "unet_rate": 1e-4, "warmup": 50, "checkpointing": False,
    "preview_every": 0, "save_every": 100, "picture_dropout": 0.1, "weighting": SNR_PLUS_1, "schedule": COSINE,
    "crop_weight": 6.0,
}  # fmt: skip
WORDS = {
    "pattern": world.PATTERNS,
    "second": ["cream", "charcoal", "sand", "chocolate"],
    "collar": ["magenta", "green", "ivory", "orange", "cyan", "purple"],
    "facing": ["leftward", "rightward"],
    "socks": ["", "socks"],
    "tailtip": ["", "tipped"],
}


def looks(scene: world.Scene) -> str:
    """What the picture of an animal shows, in words: "red spots cream pink rightward dog"."""
    told = [
        words[world.HIDDEN[name].index(getattr(scene, name))]
        for name, words in WORDS.items()
        if judge.shows(scene, name)
    ]
    return " ".join([scene.colour, *filter(None, told), scene.species])


def behind(scene: world.Scene) -> str:
    """What a caption says behind the animal."""
    return f"{scene.pose} on the {scene.side} {world.PLACE_PHRASES[scene.place]}"


def build(folder: Path, count: int) -> interleaved_dataset.Dataset:
    """The node's dataset of drawn scenes of the training seed, animals cut out; read where it was built before."""
    if folder.exists():
        return interleaved_dataset.read_dataset(folder)
    scenes = [world.sample_scene(np.random.default_rng([TRAINING_SEED, i])) for i in range(count)]
    pictures, masks = painted(scenes)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    finder = interleaved_dataset.ByMask(
        [mask[None].float() / 255 for mask in masks], [(looks(scene),) for scene in scenes], remove=True
    )
    recipe = interleaved_dataset.Recipe(min_side=8, max_share=1.0, head_share=0.0, vary_share=0.0, whole_share=0.0)
    captions = [f"a {looks(scene)} {behind(scene)}" for scene in scenes]
    interleaved_dataset.build_dataset(part, [each.float() / 255 for each in pictures], captions, finder, recipe, ())
    part.rename(folder)
    return interleaved_dataset.read_dataset(folder)


def train(
    lessons: tuple[int, int, int], scenes: int, seed: int, work: Path, *, model: Any, clip: Any, vae: Any,
    tell: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Train by the node's lessons of so many steps, on from what lies in `work`, where load finds what was learned."""
    align, read, draw = lessons
    path, state = work / STATE, None
    if path.exists():
        state = load_file(path)
    done = 0 if state is None else int(state["steps"])
    left = align + read + draw - max(done, align + read)
    if left <= 0:
        return {"steps": done}
    settings = TrainSettings(align_steps=align, read_steps=read, steps=left, seed=seed, **VALUES)
    vlm = load_vlm(SHIPPED / VLM, "float32")
    dataset, lines = build(work / "node_dataset", scenes), iter(range(1 << 62))

    def told(text: str) -> None:
        if next(lines) % 50 == 0:
            tell(text)

    encoder, parts = MultimodalEncoder(vlm), {"clip": clip, "state": state}
    watch = Watch(tell=told, save=lambda snapshot: write(snapshot, work))
    with fast(cached=False):
        trained = multimodal_training.train(model, vae, encoder, dataset, settings, watch=watch, **parts)
    tell(multimodal_training.describe(trained))
    return {"steps": trained.history.steps, "report": multimodal_training.describe(trained), **settings.named()}


def write(snapshot: Snapshot, work: Path) -> None:
    """Connector, LoRA (for the checkpoint, which is twice as wide as the U-Net that is trained) and state."""
    if not (work / VLM).exists():
        shutil.copytree(SHIPPED / VLM, work / VLM)
    for path in (work / CONNECTOR, work / LORA):
        path.parent.mkdir(parents=True, exist_ok=True)
    multimodal_files.SHELF.write(work / CONNECTOR, *multimodal_files.content(snapshot.connector), over=True)
    lora = checkpoint.widen_lora(snapshot.unet_lora)
    save_file({name: tensor.contiguous() for name, tensor in lora.items()}, work / LORA)
    part = (work / STATE).with_suffix(".part")
    save_file(snapshot.state, part)
    part.replace(work / STATE)


@dataclass(frozen=True, eq=False)
class Phrases:
    """What tokens should say of an animal, where its looks are words of the text encoder (Dictionary's interface)."""

    speaker: Speaker
    vlm: Any

    def of(self, scene: world.Scene, tokens: int) -> Tensor:
        """What so many tokens of its picture should be, (tokens, C)."""
        words = f"a {looks(scene)} {behind(scene)}".split()
        states, rows = self.speaker.of(words)
        said = torch.stack([states[row].mean(0) for row in rows])
        told = range(1, 1 + len(looks(scene).split()))
        return torch.stack([said[list(each)].mean(0) for each in shared_out(told, tokens)])

    def target(self, hidden: Hidden, lesson: Lesson, scenes: list[world.Scene]) -> tuple[Tensor, Tensor]:
        """(tokens (B, L, C), how much each counts (B, L)) of a lesson's only prompt, which leaves the looks out."""
        (prompt,), (scene,) = lesson.prompts, scenes
        said = self.speaker.say(self.vlm, tuple(bound(prompt, scene, False)), tuple(bound(prompt, scene, True)))
        return said.wanted()[None], said.weight[None]

    def heard(self, tokens: Tensor, scene: world.Scene) -> dict[str, bool]:
        """Whether what an animal's tokens (N, C) say is nearest to its own colour and traits, one changed at a time."""
        right = {}
        for name in ("colour", *(name for name in WORDS if judge.shows(scene, name))):
            values = world.ATTRIBUTES[name]
            others = torch.stack([self.of(world.edit(scene, **{name: value}), len(tokens)) for value in values])
            nearest = values[int((others - tokens.float()).pow(2).sum((1, 2)).argmin())]
            right[name] = nearest == getattr(scene, name)
        return right


def bound(prompt: Prompt, scene: world.Scene, whole: bool) -> Iterator[str | Picture]:
    """A prompt ("a ", animal, " dog sitting ...") whose picture is bound to the animal's looks; whole: with them."""
    phrase = looks(scene)
    for part in prompt:
        if isinstance(part, Picture):
            yield Picture(part.pixels, part.tokens, part.weight, phrase)
        else:
            yield part.replace(f" {scene.species}", f" {phrase}", 1) if whole else part
