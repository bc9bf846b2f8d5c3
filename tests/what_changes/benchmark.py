"""What Apply KV is set to for each kind of edit, and a subject's mask found by its words, on held-out drawn scenes.

    python dev.py bench what_changes                    the table, JSON and contact sheet

Every scene is inverted once and its source recorded (nothing is learned). Each kind of edit is drawn at several source
guidances and starts, and as the choice of `what_changes` sets them. A new place is also drawn with the animal alone in
view: by its drawn mask, and by the mask that Find Words in Picture finds of "<colour> <species>". "found" is their
overlap (intersection over union). Values of the pocket model are larger than those of SD 1.5: both are shown.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch
from benchmarks import pocket_host
from benchmarks.scenes import KINDS, Scenes, contact_sheet, defaults
from palimpsest.nodes.attention_map import nodes as maps
from palimpsest.nodes.kv.changes import ACTION, COLOUR, PLACE, SPECIES
from palimpsest.nodes.words.nodes import SelectWords
from pocket import world

CHOICES = dict(zip(KINDS, (ACTION, COLOUR, PLACE, SPECIES), strict=True))
POCKET_GUIDANCE = 10.0  # source_guidance, as in tests/pocket/settings.py
SHOWN = {"attribute": "edited", "identity": "identity", "background": "background dB", "ideal": "PSNR to ideal"}


def found_masks(scenes: Scenes) -> torch.Tensor:
    """The animals' masks (B, H, W) by the words of each scene's caption, as the nodes stand."""
    found = []
    for number, scene in enumerate(scenes.sources):
        words = f"{scene.colour} {scene.species}"
        tokens, positive, _ = SelectWords.execute(scenes.clip, world.caption(scene), words).args
        alone = replace(scenes.trajectory, latents=scenes.trajectory.latents[:, number : number + 1])
        record = maps.FindWords.execute(scenes.model, alone, tokens, positive, **defaults(maps.FindWords)).args[0]
        picture = scenes.pictures[number : number + 1]
        read = maps.ReadAttentionMap.execute(record, image=picture, **defaults(maps.ReadAttentionMap))
        found.append(read.args[1])
    return torch.cat(found)


def overlap(found: torch.Tensor, drawn: torch.Tensor) -> list[float]:
    """Intersection over union of masks (B, H, W), picture by picture."""
    a, b = found > 0.5, drawn > 0.5
    return ((a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1)).tolist()


def ways(kind: str, starts: list[float], scenes: Scenes, found: torch.Tensor) -> dict[str, dict]:
    """Settings of Apply KV that one kind of edit is drawn with, by their row; what_changes sets one of them."""
    chosen = {"what_changes": CHOICES[kind]}
    rows = {} if kind == "place" else {f"what_changes: {CHOICES[kind]}": chosen}
    rows |= {
        f"source_guidance {guidance:g}, start_percent {start:g}": {"source_guidance": guidance, "start_percent": start}
        for guidance in (1.0, 3.0, POCKET_GUIDANCE)
        for start in starts
    }
    pocket = {"source_guidance": POCKET_GUIDANCE, "start_percent": 0.0}
    for name, mask in ({"drawn mask": scenes.masks, "found mask": found} if kind == "place" else {}).items():
        rows |= {f"what_changes: {PLACE}, {name}": chosen | {"source_mask": mask}}
        rows |= {f"source_guidance {POCKET_GUIDANCE:g}, start_percent 0, {name}": pocket | {"source_mask": mask}}
    return rows


def table(found: dict[str, dict[str, float]]) -> str:
    """A markdown table; what has no meaning is a dash."""
    lines = ["| | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for name, scores in found.items():
        cells = ("-" if scores[k] != scores[k] else f"{scores[k]:.2f}" for k in SHOWN)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench what_changes", description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=48)
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--starts", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=KINDS)
    options, output = pocket_host.parse(parser)
    with torch.inference_mode():
        scenes = Scenes(options.first, options.scenes, options.steps, narrow=True)
        kv, *_ = scenes.tune(inner_steps=0)
        masks = found_masks(scenes)
        numbers = {"first scene": options.first, "steps": options.steps, "found": overlap(masks, scenes.masks)}
        print("found masks, overlap with the drawn:", [round(v, 2) for v in numbers["found"]], flush=True)
        for kind in options.kinds:
            edit, drawn = scenes.edit(kind), {}
            numbers[kind] = {}
            for name, settings in ways(kind, options.starts, scenes, masks).items():
                drawn[name] = scenes.draw(scenes.with_kv(kv, **settings), edit.prompt, 3.0)
                scores = scenes.scores(drawn[name], edit)
                numbers[kind][name] = {key: scores[key] for key in SHOWN}
                print(kind, name, {k: round(v, 2) for k, v in numbers[kind][name].items()}, flush=True)
            print(f"\n### {kind}\n\n{table(numbers[kind])}\n", flush=True)
            contact_sheet({"source": scenes.pictures, "ideal": edit.pictures} | drawn, output / f"changes_{kind}.png")
            (output / "what_changes.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
