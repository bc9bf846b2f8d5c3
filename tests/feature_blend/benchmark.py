"""Alphas of Feature Blend that were learned from pairs, beside 0.5 everywhere, on scenes that the learning never saw.

    python dev.py bench feature_blend                     table and JSON
    python dev.py bench feature_blend --edits colour      one kind of edit

For each kind of edit, Tune Feature Blend learns (preset paper) from held-out scenes and their ideal edits; then other
held-out scenes are edited: inverted with their captions, sampled from the inverted noise with the edit's caption, no
mask, the latent held nowhere. Every method is the same model with other alphas.

ideal: PSNR to the ideal edit. background: outside of both animals, against the source; no meaning where the place is
edited. edited: whether the judge sees the new attribute. identity: metrics.identity. wins: share of the scenes on which
the PSNR to the ideal is above that of alpha 0.5. Seconds of learning are the processor's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from benchmarks import pocket_host
from benchmarks.scenes import KINDS, Edit, Scenes, contact_sheet, defaults
from palimpsest.nodes.feature_blend.nodes import FeatureBlend, TuneFeatureBlend
from palimpsest.nodes.feature_blend.weights import BlendWeights
from pocket import metrics
from rivals.benchmark import setting, table, without_nan

COLUMNS = {
    "ideal": "PSNR to ideal", "wins": "above 0.5", "background": "background dB", "attribute": "edited",
    "identity": "identity",
}  # fmt: skip
HALF, ALONE, LEARNED = "alpha 0.5", "prompt alone", "alphas learned from pairs"
SHOWN = 6


def learn(scenes: Scenes, edit: Edit, options: argparse.Namespace) -> BlendWeights:
    """Alphas from the ideal edits of some scenes."""
    chosen = defaults(TuneFeatureBlend) | {"preset": "paper", "steps": options.tuning_steps, "seed": 1}
    chosen |= {"guidance": options.guidance, "pairs_per_step": options.pairs_per_step}
    edited = {"samples": scenes.vae.encode(edit.pictures)}
    return TuneFeatureBlend.execute(
        scenes.model, scenes.trajectory, scenes.was, edit.prompt, negative=scenes.nothing, edited=edited, **chosen
    ).args[0]


def drawn(scenes: Scenes, edit: Edit, options: argparse.Namespace, **blending) -> torch.Tensor:
    """Edited pictures; blending: what Feature Blend is given, nothing for the model alone."""
    model = scenes.model
    if blending:
        chosen = defaults(FeatureBlend) | {"blend_latents_until": 0.0} | blending
        model = FeatureBlend.execute(model, scenes.trajectory, scenes.was, **chosen).args[0]
    return scenes.draw(model, edit.prompt, options.guidance)


def compare(scenes: Scenes, edit: Edit, weights: BlendWeights, options: argparse.Namespace) -> tuple[dict, dict]:
    """(numbers, pictures) of every method on an edit."""
    pictures = {
        ALONE: drawn(scenes, edit, options),
        HALF: drawn(scenes, edit, options, preset="paper"),
        LEARNED: drawn(scenes, edit, options, blend_weights=weights),
    }
    near = {name: metrics.psnr(found, edit.pictures) for name, found in pictures.items()}
    rows = {name: scenes.scores(found, edit) for name, found in pictures.items()}
    for name, row in rows.items():
        row["wins"] = float("nan") if name == HALF else float((near[name] > near[HALF]).float().mean())
    return rows, {"source": scenes.pictures, "ideal edit": edit.pictures} | pictures


def main() -> None:
    """Parse, run, print, write output/bench."""
    parser = argparse.ArgumentParser(prog="python dev.py bench feature_blend", description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=64, help="the first scene that is learned from")
    parser.add_argument("--scenes", type=int, default=16, help="pairs to learn from, and as many others to test on")
    parser.add_argument("--edits", choices=KINDS, nargs="+", default=["colour", "pose", "place"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tuning-steps", type=int, default=320)
    parser.add_argument("--pairs-per-step", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--full-width", action="store_true", help="the checkpoint's own U-Net, four times slower")
    options, output = pocket_host.parse(parser)
    numbers, text, sheet = {}, [], {}
    with torch.inference_mode():
        taught, scenes = (
            Scenes(options.first + shift, options.scenes, options.steps, not options.full_width)
            for shift in (0, options.scenes)
        )
        for kind in options.edits:
            began = time.process_time()
            weights = learn(taught, taught.edit(kind), options)
            seconds = time.process_time() - began
            rows, pictures = compare(scenes, scenes.edit(kind), weights, options)
            numbers[kind] = {"rows": rows, "alphas": weights.alphas, "learning": weights.learning, "seconds": seconds}
            written = table(COLUMNS, rows, lambda column: 1 if column in ("ideal", "background") else 2)
            text += [f"### {kind}", "", written, "", f"{weights}; {weights.learning}, {seconds:.0f} s", ""]
            print("\n".join(text[-6:]), flush=True)
            sheet |= {f"{name}, {kind}": found[:SHOWN] for name, found in pictures.items()}
        save(output, {**setting(options, scenes), "tuning steps": options.tuning_steps, "edits": numbers}, text, sheet)


def save(output: Path, numbers: dict, text: list[str], sheet: dict[str, torch.Tensor]) -> None:
    """Numbers, tables and pictures in a folder."""
    (output / "pairs.json").write_text(json.dumps(without_nan(numbers), indent=2) + "\n", encoding="utf-8")
    (output / "pairs.md").write_text("\n".join(text), encoding="utf-8")
    contact_sheet(sheet, output / "pairs.jpg")


if __name__ == "__main__":
    main()
