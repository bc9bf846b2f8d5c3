"""Measure and draw everything that depends on the pocket model's weights anew, in the order of dependence.

    python dev.py refresh                  all that is out of date; hours
    python dev.py refresh kv regions       some of it
    python dev.py refresh --list           what is out of date, and nothing else

It runs at the lowest priority and may be stopped: what is done is noted in .dev/refresh with a hash of what it was
made from (the weights and the code that its script imports), and the same command goes on with the rest. A step's
output is in .dev/refresh/<step>.log. After the benchmarks come the tables of docs/results.md, then `make` for all
pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import making
from PIL import Image

ROOT, TESTS = making.ROOT, making.TESTS
NOTES = ROOT / ".dev" / "refresh"
RESULTS = "tests/benchmarks/results"
SWEEPS = (
    ("editing", "source_guidance"),
    ("editing", "start_percent"),
    ("tuning", "guidance"),
    ("tuning", "inner_steps"),
)


@dataclass(frozen=True)
class Step:
    """A benchmark's script and arguments; what it leaves in its output folder, and where that belongs."""

    script: str
    arguments: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()

    def key(self) -> str:
        """A hash of the weights, the code and the arguments."""
        return making.key_of(making.Target(((self.script, *self.arguments),), (), making.POCKET))


def results(*names: str) -> tuple[tuple[str, str], ...]:
    """Files that keep their names in the folder of results; pictures become JPEG."""
    return tuple((name, f"{RESULTS}/{name.replace('.png', '.jpg')}") for name in names)


def sweep(*settings: str, first: int, scenes: int, steps: int = 20) -> Step:
    """Settings of KV Inversion over their ranges."""
    run = ("--first", str(first), "--scenes", str(scenes), "--steps", str(steps), "--sweep", *settings)
    return Step("kv.benchmark", run, results(*(f"kv_{name}.json" for name in settings)))


def lora(files: tuple[tuple[str, str], ...], *how: str, rows: tuple[str, ...]) -> Step:
    """LoRAs of a few pictures beside the host's trainer, at the host's rate."""
    return Step("lora_training.benchmark", ("--rate", "5", *how, "--rows", *rows), files)


SHORT = ("--epochs", "4", "--curve", "0")
TWELVE = ("--pictures", "12", "--epochs", "12", "--curve", "0")
STEPS = {
    "pocket": Step("pocket.benchmark", ("--images", "64"), (("pocket.png", "tests/pocket/samples.jpg"),)),
    "pocket_flux": Step(
        "pocket.benchmark",
        ("--images", "64", "--family", "flux", "--guidance", "3"),
        (("pocket.png", "tests/pocket/samples_flux.jpg"),),
    ),
    "identity": Step("pocket.validate_metrics"),
    "kv": Step("kv.benchmark", (), results("kv.json", "kv.png")),
    "kv_75": Step("kv.benchmark", ("--guidance", "7.5"), (("kv.json", f"{RESULTS}/kv_guidance_75.json"),)),
    "figure_6": Step(
        "kv.benchmark",
        ("--figure-6", "--scenes", "8"),
        (*results("kv_figure_6.json"), ("kv_figure_6.png", f"{RESULTS}/kv_figure_6.png")),
    ),
    "learning": Step(
        "kv.benchmark",
        ("--sets", "3", "--learning", "extend, recorded", "frozen, tuned", "recompute, tuned",
         "frozen, recorded as the push, 5"),
        results("kv_learning.json"),
    ),
    "files": sweep("rank", "keyframes", first=8, scenes=6),
    "editing": sweep("source_guidance", "start_percent", first=0, scenes=4),
    "tuning": sweep("guidance", "inner_steps", "learning_rate", "layers", first=0, scenes=3, steps=10),
    "paper": Step("kv.benchmark", ("--paper", "--scenes", "2"), results("kv_paper.json")),
    "changes": Step("what_changes.benchmark", ("--starts", "0.1"), results("what_changes.json")),
    "pairs": Step("feature_blend.benchmark", ("--edits", "colour"), results("pairs.json", "pairs.md")),
    "instruction": Step(
        "instruction.benchmark",
        ("--work", ".dev/instruction"),
        results("instruction.json", "instruction.md", "instruction.jpg"),
    ),
    "rivals": Step("rivals.benchmark", (), results("edits.json", "edits.png")),
    "regions": Step("cross_attention.benchmark", (), results("regions.json", "regions.md", "regions.jpg")),
    "rivals_flux": Step("rivals.benchmark", ("--family", "flux"), results("edits_flux.json", "edits_flux.png")),
    "regions_flux": Step(
        "cross_attention.benchmark",
        ("--family", "flux", "--edits", "colour", "place", "two"),
        results("regions_flux.json", "regions_flux.md", "regions_flux.jpg"),
    ),
    "clips": Step(
        "contextdiff.benchmark",
        ("--parts", "clips", "--clips", "8"),
        (("context.json", f"{RESULTS}/context_clips.json"), ("context.md", f"{RESULTS}/context_clips.md"),
         ("context.jpg", f"{RESULTS}/context_clips.jpg")),
    ),
    "context": Step(
        "contextdiff.benchmark",
        ("--parts", "pictures", "--count", "64", "--seeds", "3"),
        (("context.json", f"{RESULTS}/context_pictures.json"), ("context.md", f"{RESULTS}/context_pictures.md"),
         ("context.jpg", f"{RESULTS}/context_pictures.jpg")),
    ),
    "kinds": Step(
        "contextdiff.benchmark",
        ("--parts", "kinds", "--guidance", "1.5", "3"),
        (("context.json", f"{RESULTS}/context_kinds.json"),),
    ),
    "convergence": Step(
        "contextdiff.benchmark",
        ("--parts", "convergence", "--clips", "3"),
        (("context.json", f"{RESULTS}/context_convergence.json"),),
    ),
    "multimodal": Step(
        "multimodal.benchmark",
        ("--trained", "tests/pocket/models"),
        results("multimodal.json", "multimodal.md", "multimodal.jpg"),
    ),
    "ink": Step(
        "multimodal.benchmark",
        ("--ablation", "findings", "--arms", "4", "--count", "16", "--guidance", "1.5"),
        (("multimodal_findings.json", f"{RESULTS}/multimodal_findings_ink.json"),),
    ),
    "rival": Step(
        "multimodal.benchmark",
        ("--ablation", "rival", "--minutes", "65", "--work", ".dev/rival"),
        results("multimodal_rival.json"),
    ),
    "pose": Step("pose_control.benchmark", (), results("pose_control.json", "pose_control.jpg")),
    "lora": lora(
        results("lora_ink.json", "lora_ink.png", "lora_ink_figure_14.png"),
        "--figure-14",
        "style",
        rows=("prompt", "host", "unet", "conv", "dropped", "offset", "biases", "style", "debiased"),
    ),
    "lora_short": lora(
        (("lora_ink.json", f"{RESULTS}/lora_ink_short.json"),),
        *SHORT,
        rows=(
            "host", "unet", "picture", "style", "debiased", "annealed", "words", "snr", "rank4", "rank32", "both",
        ),
    ),
    "lora_seeds": lora(
        (("lora_ink.json", f"{RESULTS}/lora_ink_seeds.json"),),
        *SHORT,
        "--trainings",
        "3",
        rows=("host", "biases", "style"),
    ),
    "lora_seeds_long": lora(
        (("lora_ink.json", f"{RESULTS}/lora_ink_seeds_long.json"),),
        "--curve",
        "0",
        "--trainings",
        "3",
        rows=("host", "style"),
    ),
    **{
        f"lora_{concept}": lora(
            results(f"lora_{concept}.json", f"lora_{concept}.png"), "--concept", concept, *TWELVE, rows=rows
        )
        for concept, rows in {
            "fox": ("prompt", "host", "unet", "biases", "style"),
            "zigzag": ("prompt", "host", "style"),
        }.items()
    },
    "text": Step("text_control.benchmark", (), results("text_control.json", "text_control.md", "text_control.jpg")),
    "text_style": Step("text_control.benchmark", ("--lora-steps", "700"), results("text_lora.json", "text_lora.jpg")),
}  # fmt: skip


def main() -> int:
    """Run what is out of date; then tables and pictures."""
    parser = argparse.ArgumentParser(
        prog="python dev.py refresh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--list", action="store_true", help="only say what is out of date")
    parser.add_argument("--no-make", action="store_true", help="leave the pictures and workflows as they are")
    options = parser.parse_args()
    if unknown := [name for name in options.steps if name not in STEPS]:
        parser.error(f"there is no step {unknown[0]}: choose of {', '.join(STEPS)}")
    waiting = [name for name in STEPS if name in (options.steps or STEPS) and not is_done(name)]
    if options.list:
        print("\n".join(waiting) or "everything was measured on these weights")
        return 0
    os.nice(19)
    for name in waiting:
        run(name, STEPS[name])
    join_sweeps()
    prepared("make_tables")
    return 0 if options.no_make or options.steps else prepared("making")


def is_done(name: str) -> bool:
    """Whether this step ran on what is here now."""
    note = NOTES / f"{name}.json"
    return note.is_file() and json.loads(note.read_text(encoding="utf-8"))["key"] == STEPS[name].key()


def run(name: str, step: Step) -> None:
    """Run a step, bring what it left where it belongs, note that it is done. Exits where it fails."""
    output, log, key = NOTES / name, NOTES / f"{name}.log", step.key()
    output.mkdir(parents=True, exist_ok=True)
    print(f"{name} ... ({log.relative_to(ROOT)})", flush=True)
    began = time.monotonic()
    command = [sys.executable, str(TESTS / "prepared.py"), step.script, *step.arguments]
    command += ["--output", str(output)] if step.files else []
    with log.open("w", encoding="utf-8") as stream:
        if subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT).returncode:
            raise SystemExit(f"{name} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    for left, place in step.files:
        bring(output / left, ROOT / place)
    seconds = time.monotonic() - began
    (NOTES / f"{name}.json").write_text(json.dumps({"key": key, "seconds": round(seconds)}) + "\n", encoding="utf-8")
    print(f"{name}: {seconds / 60:.0f} min", flush=True)


def prepared(*command: str) -> int:
    """Run a script of tests/ in a process that can import it."""
    return subprocess.run([sys.executable, str(TESTS / "prepared.py"), *command], cwd=ROOT).returncode


def join_sweeps() -> None:
    """The four plots of docs/results.md, two a row, where all of them were drawn."""
    paths = [NOTES / step / f"kv_{name}.png" for step, name in SWEEPS]
    if not all(path.is_file() for path in paths):
        return
    plots = [Image.open(path) for path in paths]
    width, height = plots[0].size
    sheet = Image.new("RGB", (2 * width, 2 * height), "white")
    for i, plot in enumerate(plots):
        sheet.paste(plot, (i % 2 * width, i // 2 * height))
    sheet.save(ROOT / RESULTS / "sweeps.png", optimize=True)


def bring(source: Path, target: Path) -> None:
    """Copy a file; a picture whose target is a JPEG is saved as one."""
    if source.suffix == target.suffix:
        shutil.copyfile(source, target)
    else:
        Image.open(source).convert("RGB").save(target, quality=80, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
