"""Context adapters of every kind on the drawn world: as printed, as released, of a class and of a layout.

    python dev.py bench contextdiff --parts kinds                   a run that was stopped goes on
    python dev.py bench contextdiff --parts kinds --count 2 --training 4 --training-steps 2 --guidance 3    that it runs

Each adapter is trained by Train Context Adapter on drawn pictures with their captions (a class: the animal's; a layout:
its parts), and draws held-out captions from the noise that plain DDIM gets. overlap: intersection over union of the
animal's area in the picture, as the judge sees it, and in the scene's layout. The image encoder of the CLIP kinds is
the judge's coarse path, for there is no CLIP of the drawn world: such an adapter sees by the network that it is then
measured by, which can only flatter it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_patcher
import comfy.sd
import numpy as np
import torch
from benchmarks.scenes import defaults, drawn
from contextdiff import layouts
from palimpsest.nodes.contextdiff.nodes import ContextCondition
from pocket import judge as judging
from pocket import world

if TYPE_CHECKING:
    from contextdiff.benchmark import Pocket

COLUMNS = {"all": "all right", "mean": "attributes", "overlap": "layout overlap", "distance": "distance",
           "seconds": "s of training"}  # fmt: skip
JOINT = {"train_unet": "LoRA on to_q"}
SEES = {"adapter": "CLIP of x0_hat"}


class Coarse(torch.nn.Module):
    """The judge's coarse features as tokens, as a CLIP_VISION's model gives them."""

    def __init__(self, judge: judging.Judge):
        super().__init__()
        self.judge = judge

    def forward(self, pixel_values: torch.Tensor, intermediate_output: int) -> tuple[torch.Tensor]:
        """(B, 3, 128, 128) in 0..1 -> (B, 64, 128)."""
        judge = self.judge
        return (judge.coarse(judge.middle(judge.stem(pixel_values * 2 - 1))).flatten(2).mT,)


class JudgesSight:
    """Stands for a CLIP_VISION."""

    model_type, image_size = "clip_vision_model", 128
    image_mean, image_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, judge: judging.Judge):
        self.model = Coarse(judge).requires_grad_(False)
        self.load_device = torch.device("cpu")
        self.patcher = comfy.model_patcher.CoreModelPatcher(self.model, self.load_device, self.load_device)


def by_layout(positive: list, scenes: list[world.Scene]) -> list:
    """A prompt with every scene's layout behind it."""
    chosen = defaults(ContextCondition) | {"palette": layouts.PALETTE}
    return ContextCondition.execute(positive, layout=layouts.layout(scenes), **chosen).args[0]


def by_class(positive: list, scenes: list[world.Scene]) -> list:
    """A prompt with the animal's number behind it."""
    species = list(world.ATTRIBUTES["species"])
    told = ", ".join(str(species.index(scene.species)) for scene in scenes)
    chosen = defaults(ContextCondition) | {"kind": "class", "label": told, "labels": len(species)}
    return ContextCondition.execute(positive, **chosen).args[0]


def by_text(positive: list, scenes: list[world.Scene]) -> list:
    """The prompt itself."""
    return positive


@dataclass(frozen=True)
class Row:
    """How an adapter is trained, and what it is told beside its captions."""

    recipe: dict = field(default_factory=dict)
    told: Callable[[list, list], list] = by_text


ROWS = {
    "sees the latent": Row(),
    "as printed, CLIP of x0_hat": Row(SEES),
    "as printed, with a LoRA on all attention": Row(SEES | JOINT | {"trained_with": "all attention"}),
    "a LoRA on all attention, sees the latent": Row(JOINT | {"trained_with": "all attention"}),
    "released code, with a LoRA on to_q": Row(JOINT | {"adapter": "released code", "formula": "released code"}),
    "reads the class": Row({}, by_class),
    "reads the layout": Row({}, by_layout),
    "reads the layout, CLIP of x0_hat": Row(SEES, by_layout),
}


def overlap(judge: judging.Judge, pictures: torch.Tensor, scenes: list[world.Scene]) -> float:
    """Intersection over union of the animal's area as the judge sees it and in the layout, mean over pictures."""
    with torch.no_grad():
        areas = torch.cat([judge(judging.to_pictures(part))[1] for part in pictures.split(16)])
    seen = areas[:, judging.AREAS.index("animal")] > 0
    parts = layouts.parts_of(scenes, seen.shape[-1])
    wanted = (parts > 0) & (parts < len(layouts.PARTS))  # without place and shadow
    shared, either = (seen & wanted).sum((1, 2)), (seen | wanted).sum((1, 2))
    return float((shared / either.clamp(min=1)).mean())


def draw(pocket: Pocket, sampler: Any, scenes: list, told: Callable, **how: Any) -> torch.Tensor:
    """A picture by every scene's caption, from noise that is the same for every sampler."""
    parts, levels = [], pocket.levels(how["steps"])
    for first in range(0, len(scenes), 16):
        some = scenes[first : first + 16]
        prompt = told(pocket.encode([world.caption(scene) for scene in some]), some)
        empty = {"samples": torch.zeros(len(some), 4, 16, 16)}
        seed = first + how.get("seed", 0)
        found = pocket.sample(sampler, prompt, how["guidance"], levels, empty, seed=seed, model=how.get("model"))
        parts.append(found["samples"])
    return pocket.decode(torch.cat(parts))


@dataclass(frozen=True)
class Learned:
    """What a kind samples with, and how it was trained."""

    sampler: Any
    model: Any
    told: Callable[[list, list], list]
    training: dict[str, Any]


def learn(pocket: Pocket, options: argparse.Namespace, name: str) -> Learned:
    """Train the adapter of a row of ROWS; of plain DDIM there is nothing to train."""
    from contextdiff.benchmark import RECIPE, TRAINING_SEED, context_aware, plain_ddim, trained

    if name not in ROWS:
        return Learned(plain_ddim(), pocket.model, by_text, {"seconds": float("nan")})
    row = ROWS[name]
    taught = [world.sample_scene(np.random.default_rng([TRAINING_SEED, i])) for i in range(options.training)]
    recipe = RECIPE | row.recipe | ({"steps": options.training_steps} if options.training_steps else {})
    eyes = {"clip_vision": JudgesSight(pocket.judge), "vae": pocket.vae} if "CLIP" in str(row.recipe) else {}
    told = row.told(pocket.encode([world.caption(scene) for scene in taught]), taught)
    adapter, report, seconds, lora = trained(pocket, drawn(taught)[0], told, **recipe, **eyes)
    print(f"{name}: {report}, {seconds:.0f} s of the processor", flush=True)
    model = comfy.sd.load_lora_for_models(pocket.model, None, lora, 1.0, 0.0)[0] if lora else pocket.model
    return Learned(context_aware(adapter), model, row.told, {"report": report, "seconds": seconds, "recipe": recipe})


def bench_kinds(pocket: Pocket, options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Every kind at every guidance: numbers, pictures of the contact sheet, how the adapters were trained.

    path: where the numbers of each row are kept, so that a run that was stopped goes on with the next kind.
    """
    from contextdiff.benchmark import REFERENCE, SHOWN, Kept, Reference, picture_scores  # its main imports this file

    scenes = world.held_out_scenes(options.first + options.count)[options.first :]
    others = world.held_out_scenes(1000 + REFERENCE)[1000:]
    reference = Reference.of(pocket.features(pocket.decode(pocket.latent(drawn(others)[0])["samples"])))
    kept, names = Kept(path), ("plain DDIM", *ROWS)
    setting = ", ".join(str(vars(options)[name]) for name in ("first", "count", "steps", "training", "training_steps"))
    rows = {(name, guidance): f"{name}, guidance {guidance:g}" for guidance in options.guidance for name in names}
    for name in names:
        if all(f"{rows[name, guidance]}; {setting}" in kept.numbers for guidance in options.guidance):
            continue
        learned = learn(pocket, options, name)
        for guidance in options.guidance:
            found = draw(pocket, learned.sampler, scenes, learned.told, guidance=guidance, steps=options.steps,
                         model=learned.model)  # fmt: skip
            numbers = picture_scores(pocket, reference, found, scenes)
            numbers |= {"overlap": overlap(pocket.judge, found, scenes), **learned.training}
            kept.add(f"{rows[name, guidance]}; {setting}", numbers, {rows[name, guidance]: found[:SHOWN]})
            print(f"{rows[name, guidance]}: {numbers}", flush=True)
    return {
        "rows": {row: kept.numbers[f"{row}; {setting}"] for row in rows.values()},
        "shown": {row.replace(", guidance", "\nguidance"): kept.pictures[row] for row in rows.values()},
    }
