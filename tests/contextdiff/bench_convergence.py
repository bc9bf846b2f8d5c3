"""How fast a clip is learned with the context adapter and without (the paper's figure 11 in small).

    python dev.py bench contextdiff --parts convergence --clips 3
    python dev.py bench contextdiff --parts convergence --clips 1 --training-steps 2    that it runs

Tuned on one clip and its caption for a few numbers of steps, each from the start: queries alone (Tune-A-Video style),
and queries with the context adapter beside them, which the clip is then inverted and edited with. Frames look at the
first and the one before; every edit is drawn as in the benchmark of clips. Numbers as there, mean over clips and their
edits, "+-" their deviation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.sd
import torch
from benchmarks.scenes import summarised

if TYPE_CHECKING:
    from contextdiff.benchmark import ClipEditor, Pocket

STEPS = (5, 10, 20, 40)
COLUMNS = {"edited": "edited", "followed": "prompt followed", "ideal": "PSNR to ideal", "ideal +-": "+-",
           "pairs": "CLIP-temp, all pairs"}  # fmt: skip
QUERIES = {"train_unet": "LoRA on to_q"}
WAYS = {"queries": QUERIES | {"formula": "released code"}, "queries + context adapter": QUERIES}


def edited(editor: ClipEditor, way: str, steps: int) -> torch.Tensor:
    """The latent of the edit after so many steps."""
    from contextdiff.benchmark import context_aware  # the benchmark's main imports this file

    across = editor.looking_at("first and previous")
    adapter, *_, lora = editor.learned(f"{way}, {steps} steps", across, steps=steps, **WAYS[way])
    tuned = comfy.sd.load_lora_for_models(across, None, lora, 1.0, 0.0)[0]
    adapter = None if way == "queries" else adapter
    noise = editor.inverted(f"{way}, {steps} steps", tuned, adapter)[1]
    sampler = context_aware(adapter) if adapter else None
    return editor.sampled(tuned, editor.prompt(editor.texts[1]), noise, sampler)


def course(rows: dict[str, dict[str, float]]) -> dict[str, list]:
    """(steps, likeness to the ideal edit, what stands beside the dot) of each way."""
    lines: dict[str, list] = {way: [] for way in WAYS}
    for name, row in rows.items():
        way, _, steps = name.rpartition(", ")
        lines[way].append((float(steps.split()[0]), row["ideal"], ""))
    return lines


def bench_convergence(pocket: Pocket, options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Both ways after every number of steps: mean numbers, and the first clip's frames.

    path: where the numbers of each edit are kept, so that a run that was stopped goes on.
    """
    from contextdiff.benchmark import SPREAD, ClipEditor, Kept, clip_scores, jobs

    kept = Kept(path)
    found: dict[str, list[dict]] = {}
    known: dict[tuple, tuple] = {}
    counts = (options.training_steps,) if options.training_steps else STEPS
    for number, job in enumerate(jobs(options)):
        for steps in counts:
            for way in WAYS:
                name = f"{way}, {steps} steps"
                key = f"{options.first}, {number}, {job.kind}; {name}"
                if key not in kept.numbers:
                    frames = pocket.decode(edited(ClipEditor(pocket, job, known), way, steps))
                    kept.add(key, clip_scores(pocket, frames, job), {} if number else {name: frames})
                    print(f"clip {key}: {kept.numbers[key]}", flush=True)
                found.setdefault(name, []).append(kept.numbers[key])
    shown = {name.replace(", ", ",\n"): kept.pictures[name] for name in found if name in kept.pictures}
    return {"rows": {name: summarised(several, SPREAD) for name, several in found.items()}, "shown": shown}
