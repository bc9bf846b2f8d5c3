"""An action shown instead of told: a ControlNet of drawn skeletons beside KV Inversion, on held-out drawn scenes.

    python dev.py bench pose_control                                       table, JSON and contact sheet
    python dev.py bench pose_control --sweep --first 0 --scenes 8          the control's strength and end
    python dev.py bench pose_control --stage train --work DIR --minutes 30 DIR has latents.npz of tests/pocket/train.py
    python dev.py bench pose_control --stage keep --work DIR               what was trained becomes the pack's

The pocket's control (pocket_control.py) is the host's own ControlNet, a copy of the first half of the narrow U-Net,
trained with that frozen. A skeleton of the ideal edit goes through the host's Apply ControlNet (Advanced); it tells
pose, place and the way the animal looks, and nothing of its coat. Every scene is edited as in `bench kv`, with and
without it. "the old action's words": the prompt still says the source's action, the skeleton alone says the new one.
"no action in words": it says everything else.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks import pocket_host
from benchmarks.scenes import contact_sheet, defaults
from kv.benchmark import PoseEdits, edits_table, pose_scores
from palimpsest.nodes.kv import nodes as kv_nodes
from pocket import parallel, train, world
from pose_control import pocket_control, skeleton, training
from torch import Tensor

import nodes as host_nodes

STRENGTH, END = 2.0, 0.5  # chosen by the sweep on scenes 0 to 3
STRENGTHS, ENDS = (1.0, 1.5, 2.0), (0.5, 1.0)
WITH = " + skeleton"
SHOWN = 4  # scenes on the contact sheet
MODES = {
    "prompt swapped": None,
    "KV Inversion, recorded": {},
    "the old action's words": {},
    "no action in words": {},
    "no action in words, source guidance 1": {"source_guidance": 1.0},
    "frozen, learned": {"mode": "frozen", "source_guidance": 1.0},
    "recompute, learned": {"mode": "recompute", "source_guidance": 1.0},
}


class Controlled(PoseEdits):
    """Held-out scenes with one pose edit each, and the skeletons of the ideal results."""

    def __init__(self, weights: Path, *arguments):
        super().__init__(*arguments)
        self.control, self.skeletons = pocket_control.narrow(weights), skeleton.pictures(self.poses.targets)

    def prompt_of(self, name: str) -> list:
        """What the words say beside a way of editing."""
        if name == "the old action's words":
            return self.was
        if name.startswith("no action in words"):
            told = zip(map(world.caption, self.sources), self.sources, strict=True)
            return self.encode_texts([text.replace(f" {scene.pose}", "") for text, scene in told])
        return self.poses.prompt

    def shown(self, prompt: list, strength: float, end: float) -> tuple[list, list]:
        """(positive, negative) with the skeletons, by the host's own node."""
        chosen = {"control_net": self.control, "image": self.skeletons, "strength": strength}
        window = {"start_percent": 0.0, "end_percent": end}
        found = host_nodes.ControlNetApplyAdvanced().apply_controlnet(prompt, self.nothing, **chosen, **window)
        return getattr(found, "args", found)

    def edited(self, model, prompt: list, guidance: float, strength: float = 0.0, end: float = 1.0) -> Tensor:
        """Edited pictures; strength 0 is without the control."""
        positive, negative = self.shown(prompt, strength, end) if strength else (prompt, self.nothing)
        return self.decode(self.sample(model, positive, guidance, negative))


def models_of(scenes: Controlled, guidance: float, names: list[str]) -> Iterator[tuple[str, object]]:
    """Each way of editing and its model; learned and recorded when they are first needed."""
    known = {}
    for name in names:
        settings, learned = MODES[name], name.endswith("learned")
        if settings is None:
            yield name, scenes.model
            continue
        if learned not in known:
            known[learned], _, seconds = scenes.tune(guidance=guidance, **({} if learned else {"inner_steps": 0}))
            print(
                f"{'learned' if learned else 'recorded'} in {seconds / len(scenes.sources):.1f} s a picture", flush=True
            )
        yield name, scenes.with_kv(known[learned], **settings)


def compare(scenes: Controlled, options: argparse.Namespace) -> tuple[dict, dict[str, Tensor]]:
    """(scores, pictures) of every way of editing, without and with the control."""
    rows = {"ideal edit through the autoencoder": scenes.decode(scenes.vae.encode(scenes.poses.pictures))}
    found = {name: pose_scores(scenes, pictures) for name, pictures in rows.items()}
    for name, model in models_of(scenes, options.guidance, options.modes):
        prompt = scenes.prompt_of(name)
        for strength in (0.0, options.strength):
            row = name + WITH * bool(strength)
            rows[row] = scenes.edited(model, prompt, options.guidance, strength, options.end)
            found[row] = pose_scores(scenes, rows[row])
            print(edits_table({row: found[row]}).splitlines()[-1], flush=True)
    return found, {"source": scenes.pictures, "ideal": scenes.poses.pictures, "skeleton": scenes.skeletons} | rows


def sweep(scenes: Controlled, options: argparse.Namespace) -> dict:
    """Scores of recorded KV Inversion over the control's strength and end."""
    ((_, model),) = models_of(scenes, options.guidance, ["KV Inversion, recorded"])
    found = {}
    for strength, end in ((0.0, 1.0), *((s, e) for e in ENDS for s in STRENGTHS)):
        pictures = scenes.edited(model, scenes.poses.prompt, options.guidance, strength, end)
        found[f"strength {strength:g}, to {end:g}"] = pose_scores(scenes, pictures)
        print(
            edits_table({f"strength {strength:g}, to {end:g}": pose_scores(scenes, pictures)}).splitlines()[-1],
            flush=True,
        )
    return found


def stage_train(options: argparse.Namespace) -> None:
    """Train, in processes."""
    wanted = train.Options(work=options.work, device="cpu", processes=options.processes, minutes=options.minutes,
                           resume=options.resume)  # fmt: skip
    torch.set_num_threads(1)
    parallel.run(training.train_control, training.count(), options.processes, wanted)


def stage_keep(options: argparse.Namespace) -> None:
    """Write what a training left as --weights, with its steps and minutes."""
    state = torch.load(options.work / training.STATE, map_location="cpu", weights_only=True)
    trained = training.trained_of(options.work)
    told = {"steps": str(state["step"]), "minutes": f"{state['seconds'] / 60:.0f}", "batch": "8"}
    pocket_control.save(options.weights, trained, told)
    print(f"{options.weights}: {options.weights.stat().st_size / 1e6:.1f} MB, {told}")


def stage_measure(options: argparse.Namespace) -> None:
    """Table, JSON, sheet."""
    with torch.inference_mode():
        scenes = Controlled(options.weights, options.first, options.scenes, options.steps, True)
        if options.sweep:
            found, name = {"rows": sweep(scenes, options)}, "pose_control_sweep"
        else:
            rows, pictures = compare(scenes, options)
            found, name = {"rows": rows}, "pose_control"
            contact_sheet({row: shown[:SHOWN] for row, shown in pictures.items()}, options.output / f"{name}.jpg")
        print(edits_table(found["rows"]))
    found |= {
        "first scene": options.first, "scenes": options.scenes, "steps": options.steps, "guidance": options.guidance,
        "strength": options.strength, "end": options.end, "training": pocket_control.load(options.weights)[1],
        "machine": platform.machine(), "torch": torch.__version__,
    }  # fmt: skip
    (options.output / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


STAGES = {"train": stage_train, "keep": stage_keep, "measure": stage_measure}


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(prog="python dev.py bench pose_control", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, default="measure")
    parser.add_argument("--weights", type=Path, default=pocket_control.WEIGHTS, help="what was trained, packed")
    parser.add_argument("--first", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=defaults(kv_nodes.TuneKV)["guidance"])
    parser.add_argument("--strength", type=float, default=STRENGTH)
    parser.add_argument("--end", type=float, default=END, help="share of the schedule at which the control ends")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--sweep", action="store_true", help="the control's strength and end")
    parser.add_argument("--work", type=Path, help="folder of a training")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the state in the work folder")
    options, options.output = pocket_host.parse(parser)
    if options.stage != "measure" and options.work is None:
        parser.error(f"--stage {options.stage} needs --work")
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
