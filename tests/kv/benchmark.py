"""KV Inversion on held-out drawn scenes: how exact the reconstruction is, and what each way of editing keeps.

    python dev.py bench kv                                  the table, JSON and contact sheet of the README
    python dev.py bench kv --sweep start_percent            one setting over its range: a table and a plot
    python dev.py bench kv --paper --scenes 2               the paper's two presets: what comes back at guidance 7.5
    python dev.py bench kv --figure-6 --scenes 8            starts and layers in the modes that show what was learned
    python dev.py bench kv --learning --first 0 --scenes 8  learned and recorded keys together, all ways that were tried
    python dev.py bench kv --learning "extend, recorded" "frozen, tuned" --sets 3    some ways, with their spread

Every scene is inverted once and tuned once; each edit then samples from the same noise with the edit's caption. The
ideal edit is known, so edits are scored by the pocket judge and the identity measure (tests/pocket/README.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks import pocket_host
from benchmarks.scenes import Scenes, contact_sheet, defaults
from kv import figure_6, learning
from palimpsest.nodes.inversion import ALGORITHM_1, EQUATION_4
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv import nodes as kv_nodes
from palimpsest.nodes.kv.settings import EVERYTHING, PAPER, WEIGHTS
from PIL import Image, ImageDraw, ImageFont

NUMBERS = {
    "followed": "prompt followed", "pose": "pose", "identity": "identity", "facing": "facing", "pattern": "pattern",
    "second": "2nd colour", "collar": "collar", "background": "background dB", "ideal": "PSNR to ideal",
}  # fmt: skip
SWEEPS = {
    "start_percent": (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8),
    "look_ahead": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    "source_guidance": (1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
    "strength": (0.25, 0.5, 0.75, 1.0),
    "guidance": (1.0, 2.0, 3.0, 4.0, 5.0, 7.5),
    "inner_steps": (0, 2, 5, 10, 20),
    "learning_rate": (0.01, 0.03, 0.1, 0.3),
    "layers": ("decoder", "encoder", "middle", "all"),
    "rank": (0, 2, 3, 4, 6, 8),
    "keyframes": (1, 2, 3),
    "batch_steps": (1, 4),
    "learn": (EVERYTHING, WEIGHTS),
}
TUNING = ("guidance", "inner_steps", "learning_rate", "layers", "rank", "keyframes", "batch_steps", "learn")


class PoseEdits(Scenes):
    """Held-out scenes, each with one pose edit."""

    def __init__(self, first: int, count: int, steps: int, narrow: bool):
        super().__init__(first, count, steps, narrow)
        self.poses = self.edit("pose")

    def with_pose(self, kv, guidance: float, **settings) -> torch.Tensor:
        """Edited pictures with the embeddings, at the node's defaults except `settings`."""
        return self.draw(self.with_kv(kv, **settings), self.poses.prompt, guidance)


def compare(scenes: PoseEdits, guidance: float, tuning: dict) -> tuple[dict, dict]:
    """The README's table: reconstructions, then edits. Returns (numbers, pictures by row)."""
    ceiling = scenes.decode(scenes.latent["samples"])
    plain = scenes.draw(scenes.model, scenes.was, guidance)
    kv, tuned, seconds = scenes.tune(guidance=guidance, **tuning)
    untuned, _, _ = scenes.tune(guidance=guidance, **tuning | {"inner_steps": 0})
    rows = {
        "ideal edit through the autoencoder": scenes.decode(scenes.vae.encode(scenes.poses.pictures)),
        "source, not edited": ceiling,
        "prompt swapped": scenes.draw(scenes.model, scenes.poses.prompt, guidance),
        "KV Inversion, defaults": scenes.with_pose(kv, guidance),
    }
    for name, (embeddings, settings) in {
        "recompute (Algorithm 1)": (kv, {"mode": "recompute", "source_guidance": 1.0}),
        "paper preset": (kv, {"preset": PAPER}),
        "frozen": (kv, {"mode": "frozen", "source_guidance": 1.0}),
        "extend, no source guidance": (kv, {"source_guidance": 1.0}),
        "source's K, V without tuning": (untuned, {"source_guidance": 1.0, "start_percent": 0.1}),
    }.items():
        rows[name] = scenes.with_pose(embeddings, guidance, **settings)
    numbers = {
        "reconstruction": {
            "autoencoder alone": scenes.reconstruction(ceiling),
            "DDIM": scenes.reconstruction(plain),
            "tuned": scenes.reconstruction(tuned),
        },
        "edits": {name: pose_scores(scenes, pictures) for name, pictures in rows.items()},
        "tuning seconds a picture": seconds / len(scenes.sources),
        "iterations": kv.info["iterations"],
        "MB a picture": kv.bytes / 1e6 / kv.pictures,
    }
    return numbers, {"source": scenes.pictures, "ideal": scenes.poses.pictures, "DDIM": plain, "tuned": tuned} | rows


def papers_presets(scenes: PoseEdits) -> dict[str, dict[str, float]]:
    """The paper's presets in all three stages, 50 steps: PSNR to the source of what comes back."""
    found = {"autoencoder alone": {"rebuilt": scenes.reconstruction(scenes.decode(scenes.latent["samples"]))}}
    scenes.steps = 50
    prompts = {"positive": scenes.was, "negative": scenes.nothing}
    for preset in (ALGORITHM_1, EQUATION_4):
        stage = {"preset": preset, "reconstruction_guidance": 0.0}
        inverted = Invert.execute(scenes.model, scenes.latent, **prompts, **defaults(Invert) | stage)
        scenes.trajectory, scenes.noise, *_ = inverted.args
        kv, tuned, seconds = scenes.tune(preset=preset, keep_source=False)
        model = scenes.with_kv(kv, mode="recompute", source_guidance=1.0, start_percent=0.0)
        found[preset] = {
            "DDIM alone at 7.5": scenes.reconstruction(scenes.draw(scenes.model, scenes.was, 7.5)),
            "rebuilt": scenes.reconstruction(tuned),
            "sampled at 7.5": scenes.reconstruction(scenes.draw(model, scenes.was, 7.5)),
            "sampled at 1": scenes.reconstruction(scenes.draw(model, scenes.was, 1.0)),
            "seconds a picture": seconds / len(scenes.sources),
        }
        print(preset, {name: round(value, 2) for name, value in found[preset].items()}, flush=True)
    return found


def learned_together(scenes: PoseEdits, guidance: float, ways: list[str]) -> dict[str, dict[str, float]]:
    """Scores of the ways to look at what was learned and recorded, of all of them where none is named."""
    found = {}
    for name, pictures in learning.tried(scenes, guidance, ways):
        found[name] = pose_scores(scenes, pictures)
        print(edits_table({name: found[name]}).splitlines()[-1], flush=True)
    return found


def sets_of(options: argparse.Namespace) -> Iterator[PoseEdits]:
    """--sets sets of --scenes scenes, one after the other."""
    for number in range(options.sets):
        first = options.first + number * options.scenes
        yield PoseEdits(first, options.scenes, options.steps, not options.full_width)


def with_spread(sets: list[dict[str, dict[str, float]]]) -> dict[str, dict]:
    """The mean of every score over sets of scenes; "spread", where they are several: standard deviations (n - 1)."""
    if len(sets) == 1:
        return sets[0]
    found = {}
    for way in sets[0]:
        columns = {name: [scores[way][name] for scores in sets] for name in NUMBERS}
        spread = {name: statistics.stdev(column) for name, column in columns.items()}
        found[way] = {name: statistics.mean(column) for name, column in columns.items()} | {"spread": spread}
    return found


def pose_scores(scenes: PoseEdits, pictures: torch.Tensor) -> dict[str, float]:
    """NUMBERS of edited pictures."""
    found = scenes.scores(pictures, scenes.poses)
    return {name: found[name] for name in NUMBERS}


def sweep(scenes: PoseEdits, name: str, guidance: float) -> dict:
    """One setting over its range: {value: scores and reconstruction}."""
    kv = None
    found = {}
    for value in SWEEPS[name]:
        strength = value if name == "guidance" else guidance
        if name in TUNING or kv is None:
            kv, tuned, _ = scenes.tune(**({"guidance": guidance} | ({name: value} if name in TUNING else {})))
        pictures = scenes.with_pose(kv, strength, **({} if name in TUNING else {name: value}))
        found[str(value)] = pose_scores(scenes, pictures) | {
            "reconstruction": scenes.reconstruction(tuned),
            "MB": kv.bytes / 1e6 / kv.pictures,
        }
        print(f"{name} {value}: " + ", ".join(f"{k} {v:.2f}" for k, v in found[str(value)].items()), flush=True)
    return found


def edits_table(edits: dict[str, dict[str, float]]) -> str:
    """A markdown table of scores."""
    lines = ["| | " + " | ".join(NUMBERS.values()) + " |", "|---" * (len(NUMBERS) + 1) + "|"]
    for name, scores in edits.items():
        cells = (f"{scores[k]:.1f}" if k in ("background", "ideal") else f"{scores[k]:.2f}" for k in NUMBERS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, float]], name: str, path: Path) -> None:
    """Lines of the scores in 0..1 over the setting's values."""
    curves = {
        "pose": "#d62728",
        "followed": "#ff7f0e",
        "identity": "#1f77b4",
        "pattern": "#2ca02c",
        "facing": "#9467bd",
    }
    width, height, edge = 560, 320, 46
    image = Image.new("RGB", (width + 120, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    values = list(found)
    xs = [edge + i * (width - 2 * edge) / max(len(values) - 1, 1) for i in range(len(values))]

    def y(score: float) -> float:
        return height - edge - score * (height - 2 * edge)

    for mark in (0, 0.25, 0.5, 0.75, 1):
        draw.line([(edge, y(mark)), (width - edge, y(mark))], fill="#dddddd")
        draw.text((8, y(mark) - 8), f"{mark:.2f}", fill="black", font=font)
    for x, value in zip(xs, values, strict=True):
        draw.text((x - 10, height - edge + 8), value, fill="black", font=font)
    draw.text((width // 2 - 40, height - 22), name, fill="black", font=font)
    for i, (curve, colour) in enumerate(curves.items()):
        points = [(x, y(found[v][curve])) for x, v in zip(xs, values, strict=True)]
        draw.line(points, fill=colour, width=2)
        draw.text((width - edge + 12, edge + 20 * i), curve, fill=colour, font=font)
    image.save(path)


def write(path: Path, found: dict) -> None:
    """A file of results."""
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse, run, print, write output/bench."""
    parser = argparse.ArgumentParser(prog="python dev.py bench kv", description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=32, help="the defaults were chosen on scenes 0 to 7")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=defaults(kv_nodes.TuneKV)["guidance"])
    parser.add_argument("--layers", default=defaults(kv_nodes.TuneKV)["layers"])
    parser.add_argument("--inner-steps", type=int, default=defaults(kv_nodes.TuneKV)["inner_steps"])
    parser.add_argument("--sweep", choices=SWEEPS, nargs="*", default=[])
    parser.add_argument("--paper", action="store_true", help="only the paper's two presets")
    parser.add_argument("--figure-6", action="store_true", help="only starts and layers, in the learned modes")
    parser.add_argument("--learning", nargs="*", metavar="WAY", help="only ways to look at the learned: these, or all")
    parser.add_argument("--sets", type=int, default=1, help="of --learning: so many sets of --scenes scenes, in turn")
    parser.add_argument("--full-width", action="store_true", help="the checkpoint's own U-Net, four times slower")
    options, output = pocket_host.parse(parser)
    with torch.inference_mode():
        sets = sets_of(options)
        scenes = next(sets)
        if options.paper:
            found = papers_presets(scenes)
            write(output / "kv_paper.json", found)
        elif options.learning is not None:
            every = itertools.chain([scenes], sets)
            found = with_spread([learned_together(each, options.guidance, options.learning) for each in every])
            print(edits_table(found))
            write(output / "kv_learning.json", found)
        elif options.figure_6:
            found = figure_6.measured(scenes, options.guidance, pose_scores)
            figure_6.plots.to_image(figure_6.plotted(found)[0]).save(output / "kv_figure_6.png")
            write(output / "kv_figure_6.json", found)
            print("\n\n".join(f"{mode}\n{edits_table(scores)}" for mode, scores in found.items()))
        elif not options.sweep:
            tuning = {"layers": options.layers, "inner_steps": options.inner_steps}
            numbers, rows = compare(scenes, options.guidance, tuning)
            contact_sheet(rows, output / "kv.png")
            numbers |= {
                "first scene": options.first,
                "scenes": options.scenes,
                "steps": options.steps,
                "guidance": options.guidance,
            }
            numbers |= {
                "torch": torch.__version__,
                "machine": platform.machine(),
                "device": str(scenes.model.load_device),
            }
            write(output / "kv.json", numbers)
            reconstruction = ", ".join(f"{k} {v:.2f} dB" for k, v in numbers["reconstruction"].items())
            print(f"reconstruction at guidance {options.guidance:g}: {reconstruction}")
            print(f"tuning {numbers['tuning seconds a picture']:.0f} s, {numbers['MB a picture']:.1f} MB a picture\n")
            print(edits_table(numbers["edits"]))
        for name in options.sweep:
            found = sweep(scenes, name, options.guidance)
            plot(found, name, output / f"kv_{name}.png")
            write(output / f"kv_{name}.json", found)
