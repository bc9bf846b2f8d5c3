"""KV Inversion beside other ways of editing a real picture, in one host, on held-out drawn scenes.

    python dev.py bench rivals                                         tables, JSON and contact sheet
    python dev.py bench rivals --edits pose --methods ours masactrl    some of it
    python dev.py bench rivals --sweep --first 0 --scenes 4            the rivals at other settings
    python dev.py bench rivals --family flux                           on the pocket transformer (rivals/flow.py)

Every scene is inverted once (prompt: its caption, guidance 1); every method edits from that trajectory by the same new
caption, with the same sampler, steps and guidance. Each way is written anew in `rivals`, at its published settings
scaled to the steps and layers at hand. The sweep (scenes 0 to 3, poses) moves identity little for MasaCtrl (0.43 to
0.44 wherever it starts) and null-text inversion (0.35 at the published rate, 0.39 at a third of it). Plug-and-play
keeps the old pose as published; of the settings that reach the new one, attention alone is best (0.45): the row "tuned
here".

InstructPix2Pix is the pocket's own 8-channel U-Net, trained on instructions (bench instruction_training). It is told
what to do ("let it be sitting") instead of the new caption, and starts from new noise beside the picture.

KV Inversion runs as the nodes stand, in every mode (source guidance only in *extend*, to which it belongs); *extend*
also "recorded only", with nothing learned, which the other modes refuse. The rows "source mask" may look only at the
source's animal, by its drawn mask, as one would have it where the surroundings change; the other rows know no mask.

Costs are per picture, of a batch of all scenes. "once" is what a picture needs before its first edit (inversion and
tuning), "each" what every edit adds, "first edit" both together. Passes are rows through the U-Net; a row with a
gradient counts three, one forward and two backward, also where a method spares itself a part of the network. "kept" are
the bytes that must stay between the steps and edits: latents, embeddings, keys and values. On CUDA "peak" is the most
memory that was allocated at once, model included. A rebuilt picture is what the source's prompt gives at the editing
guidance, or the source's own branch where a method has one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import pocket_host
from benchmarks.flow_scenes import FlowScenes
from benchmarks.scenes import KINDS, Edit, Scenes, contact_sheet, defaults
from comfy.patcher_extension import WrappersMP
from instruction_training.benchmark import PICTURE_GUIDANCE, TEXT_GUIDANCE
from palimpsest.nodes.kv import nodes as kv_nodes
from rivals import flow, instruct_pix2pix, masactrl, null_text, plug_and_play, prompt_to_prompt
from rivals.prepared_method import Prepared, size

SCORES = {
    "attribute": "edited", "followed": "prompt followed", "identity": "identity", "texture": "texture",
    "facing": "facing", "pattern": "pattern", "second": "2nd colour", "collar": "collar",
    "background": "background dB", "background ssim": "background SSIM", "inside": "inside dB",
    "ideal": "PSNR to ideal",
}  # fmt: skip
DECIBELS = ("background", "inside", "ideal")
COSTS = {
    "rebuilt": "rebuilt dB", "seconds once": "s once", "seconds first": "s first edit", "seconds each": "s each",
    "passes once": "passes once", "passes first": "passes first edit", "passes each": "passes each", "kept": "kept MB",
    "peak": "peak MB",
}  # fmt: skip
SHOWN = 4  # scenes of each kind on the contact sheet
IDEAL, UNEDITED = "ideal edit through the autoencoder", "source, not edited"


# --------------------------------------------------------------------------------------------------------- the methods


def prompt_swap(scenes: Scenes, guidance: float) -> Prepared:
    """DDIM inversion, then the new prompt from the same noise."""
    draw = partial(scenes.sample, scenes.model, guidance=guidance)
    return Prepared(draw, lambda: draw(scenes.was), size(scenes.noise["samples"]))


def negative_prompt(scenes: Scenes, guidance: float) -> Prepared:
    """Negative-prompt inversion (arXiv:2305.16807): the source's prompt on the negative side."""
    draw = partial(scenes.sample, scenes.model, guidance=guidance, negative=scenes.was)
    return Prepared(draw, lambda: draw(scenes.was), size(scenes.noise["samples"]))


def tuned_null_text(scenes: Scenes, guidance: float, **settings: Any) -> Prepared:
    """Null-text inversion, then the new prompt."""
    phi, rebuilt = null_text.tune(scenes.model, scenes.trajectory, scenes.was, scenes.nothing, guidance, **settings)
    model = null_text.apply(scenes.model, scenes.trajectory, phi)
    draw = partial(scenes.sample, model, guidance=guidance)
    return Prepared(draw, lambda: rebuilt, size(scenes.noise["samples"], phi))


def beside_source(rival: Any, exact: bool, scenes: Scenes, guidance: float, **settings: Any) -> Prepared:
    """MasaCtrl or plug-and-play, the source's branch free or exact."""
    model = rival.apply(scenes.model, scenes.trajectory, scenes.was, exact, **settings)
    draw = partial(scenes.sample, model, guidance=guidance)
    if exact:
        end = scenes.model.model.process_latent_out(scenes.trajectory.latents[-1].clone())
        return Prepared(draw, lambda: end, size(scenes.trajectory.latents))
    return Prepared(draw, lambda: scenes.sample(scenes.model, scenes.was, 1.0), size(scenes.noise["samples"]))


def words_beside_source(exact: bool, scenes: Scenes, guidance: float) -> Prepared:
    """Prompt-to-Prompt, the source's branch free or exact; its patch is made anew for every edit's words."""

    def draw(prompt: list) -> torch.Tensor:
        model = prompt_to_prompt.apply(scenes.model, scenes.trajectory, (scenes.was, prompt), exact)
        return scenes.sample(model, prompt, guidance)

    return replace(beside_source(masactrl, exact, scenes, guidance), draw=draw)  # the same branch, kept and rebuilt


def instructed(scenes: Scenes, guidance: float) -> Prepared:
    """InstructPix2Pix by the instruction of each edit, at its training's guidances; nothing is inverted."""
    model = instruct_pix2pix.load(scenes)
    guidances = {"text": TEXT_GUIDANCE, "picture": PICTURE_GUIDANCE}

    def draw(prompt: list) -> torch.Tensor:
        return instruct_pix2pix.sample(scenes, model, prompt[0][1]["scenes"], **guidances)

    return Prepared(draw, lambda: draw(scenes.was), size(scenes.latent["samples"]), inverted=False)


def ours(scenes: Scenes, guidance: float, subject: bool = False, recorded: bool = False, **editing: Any) -> Prepared:
    """KV Inversion as the nodes stand except `editing`.

    subject: only the source's animal may be looked at; recorded: nothing is learned.
    """
    chosen = defaults(kv_nodes.TuneKV) | {"guidance": guidance} | ({"inner_steps": 0} if recorded else {})
    kv, rebuilt, _ = kv_nodes.TuneKV.execute(
        scenes.model, scenes.trajectory, scenes.was, negative=scenes.nothing, **chosen
    ).args
    model = scenes.with_kv(kv, **editing, **{"source_mask": scenes.masks} if subject else {})
    draw = partial(scenes.sample, model, guidance=guidance)
    return Prepared(draw, lambda: rebuilt["samples"], size(scenes.noise["samples"]) + kv.bytes)


METHODS: dict[str, tuple[str, Callable[[Scenes, float], Prepared]]] = {
    "swap": ("prompt swap after DDIM", prompt_swap),
    "negative": ("negative-prompt inversion", negative_prompt),
    "null": ("null-text inversion", tuned_null_text),
    "masactrl": ("DDIM + MasaCtrl", partial(beside_source, masactrl, False)),
    "direct-masactrl": ("direct inversion + MasaCtrl", partial(beside_source, masactrl, True)),
    "pnp": ("DDIM + plug-and-play", partial(beside_source, plug_and_play, False)),
    "direct-pnp": ("direct inversion + plug-and-play", partial(beside_source, plug_and_play, True)),
    "direct-pnp-here": (
        "direct + plug-and-play, tuned here",
        partial(beside_source, plug_and_play, True, features_end=0.0, attention_end=0.5),
    ),
    "p2p": ("DDIM + Prompt-to-Prompt", partial(words_beside_source, False)),
    "direct-p2p": ("direct inversion + Prompt-to-Prompt", partial(words_beside_source, True)),
    "instruct": ("InstructPix2Pix", instructed),
    "ours": ("KV Inversion", ours),
    "ours-recorded": ("KV Inversion, recorded only", partial(ours, recorded=True)),
    "ours-soft": ("KV Inversion, source guidance 1", partial(ours, source_guidance=1.0)),
    "ours-soft-recorded": (
        "KV Inversion, source guidance 1, recorded only",
        partial(ours, recorded=True, source_guidance=1.0),
    ),
    "ours-subject": ("KV Inversion, source mask", partial(ours, subject=True)),
    "ours-subject-recorded": ("KV Inversion, source mask, recorded only", partial(ours, subject=True, recorded=True)),
    **{
        f"ours-{mode}": (f"KV Inversion, {mode}", partial(ours, mode=mode, source_guidance=1.0))
        for mode in ("frozen", "recompute")
    },
}

FAMILIES = {"unet": METHODS, "flux": flow.METHODS}

SWEEP: dict[str, Callable[[Scenes, float], Prepared]] = {
    **{
        f"direct + MasaCtrl, start {start:g}, layers from {first:g}": partial(
            beside_source, masactrl, True, start=start, first_layer=first
        )
        for first in (0.0, 0.4, 0.625, 0.8)
        for start in (0.0, 0.08, 0.2, 0.4)
    },
    **{
        f"direct + plug-and-play, features to {features:g}, attention to {attention:g}": partial(
            beside_source, plug_and_play, True, features_end=features, attention_end=attention
        )
        for features, attention in ((0.8, 0.5), (0.5, 0.5), (0.3, 0.3), (0.2, 0.1), (0.1, 0.1), (0.0, 0.5), (0.5, 0.0))
    },
    **{f"null-text, rate {rate:g}": partial(tuned_null_text, rate=rate) for rate in (0.003, 0.01, 0.03, 0.1)},
}


# ----------------------------------------------------------------------------------------------------------- measuring


class PassCount:
    """DIFFUSION_MODEL wrapper: rows through the U-Net, three for a row that a gradient goes back through."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.rows += len(x) * (3 if torch.is_grad_enabled() else 1)
        return executor(x, *args, **kwargs)


@dataclass(frozen=True)
class Cost:
    """Of one picture: seconds and passes; of all at once: CUDA's peak in bytes, nan elsewhere.

    seconds: the clock's with CUDA; on a CPU the processor's, summed over its cores, whatever else is running there.
    """

    seconds: float
    passes: float
    peak: float


@dataclass(frozen=True)
class Meter:
    """Runs something for a number of pictures and says what it cost."""

    count: PassCount
    pictures: int
    device: torch.device

    def __call__(self, run: Callable, *args: Any) -> tuple[Any, Cost]:
        """(result, cost)."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        clock = time.monotonic if cuda else time.process_time
        rows, began = self.count.rows, clock()
        result = run(*args)
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds, passes = clock() - began, self.count.rows - rows
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else math.nan
        return result, Cost(seconds / self.pictures, passes / self.pictures, peak)


def measure(
    scenes: Scenes, meter: Meter, inversion: Cost, method: Callable, edits: list[Edit], guidance: float
) -> tuple[dict, dict[str, torch.Tensor]]:
    """One method over all edits: (costs and scores by kind, pictures by kind)."""
    prepared, once = meter(method, scenes, guidance)
    inversion = inversion if prepared.inverted else Cost(0.0, 0.0, math.nan)
    latents, each = zip(*(meter(prepared.draw, edit.prompt) for edit in edits), strict=True)
    pictures = {edit.kind: scenes.decode(latent) for edit, latent in zip(edits, latents, strict=True)}
    costs = {
        "rebuilt": scenes.reconstruction(scenes.decode(prepared.rebuild())),
        "seconds once": inversion.seconds + once.seconds,
        "seconds each": sum(cost.seconds for cost in each) / len(edits),
        "passes once": inversion.passes + once.passes,
        "passes each": sum(cost.passes for cost in each) / len(edits),
        "seconds first": inversion.seconds + once.seconds + each[0].seconds,
        "passes first": inversion.passes + once.passes + each[0].passes,
        "kept": prepared.kept / meter.pictures / 1e6,
        "peak": max(cost.peak for cost in (once, *each)) / 1e6,
    }
    return {"costs": costs, "scores": {edit.kind: scenes.scores(pictures[edit.kind], edit) for edit in edits}}, pictures


def overall(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over the kinds of edit that have a value."""
    return {name: torch.tensor([kind[name] for kind in scores.values()]).nanmean().item() for name in SCORES}


# ----------------------------------------------------------------------------------------------------------- reporting


def table(columns: dict[str, str], rows: dict[str, dict[str, float]], digits: Callable[[str], int]) -> str:
    """A markdown table; a number without meaning is a dash, a column of them is left out."""
    columns = {k: v for k, v in columns.items() if not all(math.isnan(row[k]) for row in rows.values())}
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = ("-" if math.isnan(row[k]) else f"{row[k]:.{digits(k)}f}" for k in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def score_table(rows: dict[str, dict[str, float]]) -> str:
    """A table of SCORES."""
    return table(SCORES, rows, lambda column: 1 if column in DECIBELS else 2)


def cost_table(found: dict[str, dict]) -> str:
    """A table of COSTS."""
    digits = {"rebuilt": 2, "passes once": 0, "passes first": 0, "passes each": 0, "kept": 3, "peak": 0}
    return table(COSTS, {k: v["costs"] for k, v in found.items()}, lambda column: digits.get(column, 1))


def setting(options: argparse.Namespace, scenes: Scenes) -> dict[str, Any]:
    """What the numbers were measured on."""
    from comfyui_version import __version__ as comfyui

    return {
        "first scene": options.first,
        "scenes": options.scenes,
        "steps": options.steps,
        "guidance": options.guidance,
        "network": "transformer" if scenes.family == "flux" else "checkpoint's" if options.full_width else "narrow",
        "dtype": str(scenes.model.model.get_dtype()),
        "device": str(scenes.model.load_device),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ComfyUI": comfyui,
        "Python": platform.python_version(),
    }


def sheet_rows(scenes: Scenes, edits: list[Edit], drawn: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of the contact sheet: the first scenes of every kind side by side."""
    rows = {"source": {edit.kind: scenes.pictures for edit in edits}}
    rows |= {"ideal edit": {edit.kind: edit.pictures for edit in edits}} | drawn
    return {name: torch.cat([pictures[edit.kind][:SHOWN] for edit in edits]) for name, pictures in rows.items()}


# ------------------------------------------------------------------------------------------------------------ the runs


def compare(scenes: Scenes, count: PassCount, methods: dict, kinds: list[str], guidance: float, sheet: Path) -> dict:
    """Measure every method on every kind of edit, print the tables, save the contact sheet; returns the numbers."""
    edits = [scenes.edit(kind) for kind in kinds]
    meter = Meter(count, len(scenes.sources), scenes.model.load_device)
    scenes.sample(scenes.model, scenes.was, 1.0)  # loads the model, so that no method pays for it
    if "instruct" in methods:
        instruct_pix2pix.load(scenes)
    _, inversion = meter(scenes.invert)
    ceiling = scenes.decode(scenes.latent["samples"])
    references = {
        IDEAL: {edit.kind: scenes.decode(scenes.vae.encode(edit.pictures)) for edit in edits},
        UNEDITED: {edit.kind: ceiling for edit in edits},
    }
    bounds = {
        name: {edit.kind: scenes.scores(pictures[edit.kind], edit) for edit in edits}
        for name, pictures in references.items()
    }
    found, drawn = {}, {}
    for name, method in methods.values():
        found[name], drawn[name] = measure(scenes, meter, inversion, method, edits, guidance)
        print(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in overall(found[name]["scores"]).items()), flush=True)
    scores = {name: entry["scores"] for name, entry in found.items()} | bounds
    for kind in kinds:
        print(f"\n### {kind}\n\n" + score_table({name: by_kind[kind] for name, by_kind in scores.items()}))
    if len(kinds) > 1:
        print("\n### all edits\n\n" + score_table({name: overall(by_kind) for name, by_kind in scores.items()}))
    print(f"\n### costs a picture\n\n{cost_table(found)}")
    print(f"\nthe autoencoder alone rebuilds to {scenes.reconstruction(ceiling):.2f} dB")
    contact_sheet(sheet_rows(scenes, edits, drawn), sheet)
    return {"methods": found, "references": bounds, "autoencoder": scenes.reconstruction(ceiling)}


def sweep(scenes: Scenes, kind: str, guidance: float) -> dict:
    """The rivals' settings on one kind of edit, one row each."""
    edit, found = scenes.edit(kind), {}
    for name, method in SWEEP.items():
        pictures = scenes.decode(method(scenes, guidance).draw(edit.prompt))
        found[name] = scenes.scores(pictures, edit)
        print(f"{name}: " + ", ".join(f"{k} {found[name][k]:.2f}" for k in SCORES), flush=True)
    print("\n" + score_table(found))
    return found


def without_nan(value: Any) -> Any:
    """nan as null, for JSON."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> None:
    """Parse, run, print, write output/bench."""
    parser = argparse.ArgumentParser(prog="python dev.py bench rivals", description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=32, help="the defaults were chosen on scenes 0 to 7")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--edits", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--family", choices=FAMILIES, default="unet")
    parser.add_argument("--methods", choices=[*METHODS, *flow.METHODS], nargs="+", help="default: all of the family")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=defaults(kv_nodes.TuneKV)["guidance"])
    parser.add_argument("--sweep", action="store_true", help="the rivals' settings on the first of --edits")
    parser.add_argument("--full-width", action="store_true", help="the checkpoint's own U-Net, four times slower")
    options, output = pocket_host.parse(parser)
    known, flux = FAMILIES[options.family], options.family == "flux"
    with torch.inference_mode():
        kind_of = FlowScenes if flux else Scenes
        scenes = kind_of(options.first, options.scenes, options.steps, not options.full_width)
        count = PassCount()
        scenes.model = scenes.model.clone()
        scenes.model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "benchmark_edits", count)
        if options.sweep:
            name, numbers = "edits_sweep", {"sweep": sweep(scenes, options.edits[0], options.guidance)}
        else:
            name = "edits_flux" if flux else "edits"
            methods = {key: known[key] for key in known if key in (options.methods or known)}
            kinds = [kind for kind in KINDS if kind in options.edits]
            numbers = compare(scenes, count, methods, kinds, options.guidance, output / f"{name}.png")
        numbers = setting(options, scenes) | without_nan(numbers)
        (output / f"{name}.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
