"""What the pack adds to the host's work: predicted, counted on tensors without storage, and measured where a GPU is.

    python dev.py bench cost                          SD 1.5, SDXL and six transformers at full size
    python dev.py bench cost --family Z-Image         one of them
    python dev.py bench cost --lora                   trainings alone: Train LoRA beside the host's own trainer
    python dev.py bench cost --device cpu --tiny      the measuring code on a small network, anywhere

Counts need neither weights nor a GPU and are the same everywhere (counting.py says what a roof is). Times are of the
host with random weights, the kinds of call taking turns, medians. Ratios are to the same family's plain step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfyui_version
import torch
from benchmarks import (
    counting,
    counting_blends,
    counting_host_lora,
    counting_lora,
    counting_masks,
    counting_transformers,
)
from benchmarks.counting import STEPS, Calls, Family
from palimpsest.nodes.host import sampling as host_sampling
from palimpsest.nodes.inversion import ddim as inversion
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV

FULL = "keys and values in full"


@dataclass(frozen=True)
class Row:
    """A line of the table: a sum of calls, what it is compared with, the goal for that ratio, and predictions.

    predicted: (H200 roof in ms, ratio) by family, from counts made before the code was written. timed: whether it is
    measured where there is a device. needs: a call without which there is no line.
    """

    name: str
    cost: Callable[[dict], Any]
    than: Callable[[dict], Any] = lambda calls: calls["plain"]
    goal: float | None = None
    predicted: dict[str, tuple[float | None, float | None]] | None = None
    timed: bool = True
    needs: str = ""


def whole(n: int, tuning: str = "") -> Callable[[dict], Any]:
    """Tuning of one picture with n inner iterations a step."""
    return lambda calls: (calls[f"step{tuning}"] + calls[f"iteration{tuning}"] * (n - 1)) * STEPS


def sampling(calls: dict) -> Any:
    """Plain sampling of one picture."""
    return calls["plain"] * STEPS


def call(name: str) -> Callable[[dict], Any]:
    """One of the calls that are counted and measured."""
    return lambda calls: calls[name]


LORA_ROWS = [
    *(Row(f"Train LoRA, a step, {name}", call(name), timed=False) for name in counting_lora.TAUGHT),
    *(
        Row(f"the host's trainer, a step, {name}", call(needed), timed=False, needs=needed)
        for name in counting_host_lora.TAUGHT
        for needed in [counting_host_lora.theirs(name)]
    ),
]
ROWS = [
    Row("plain step, guidance 7.5", call("plain"), predicted={"SD 1.5": (2.86, 1), "SDXL": (22.2, 1)}),
    Row("inversion step", call("inversion"), goal=0.6, predicted={"SD 1.5": (1.52, 0.53), "SDXL": (11.2, 0.504)}),
    Row(
        "Apply KV, recompute",
        call("recompute"),
        goal=1.015,
        predicted={"SD 1.5": (2.89, 1.011), "SDXL": (22.5, 1.012)},
    ),
    Row("Apply KV, recompute, source guidance", call("recompute guided")),
    Row("Apply KV, frozen", call("frozen")),
    Row("Apply KV, extend", call("extend")),
    Row("Apply KV outside its percents", call("outside"), goal=1.005),
    *(Row(f"Cross-Attention Mask, {name}", call(name), goal=1.005) for name in counting_masks.MASKED),
    *(
        Row(f"Feature Blend, {name}", call(name), goal=counting_blends.GOALS.get(name, counting_blends.CACHED_GOAL))
        for name in counting_blends.BLENDED
    ),
    Row("tuning, an iteration", call("iteration"), predicted={"SD 1.5": (2.14, 0.75), "SDXL": (15.2, 0.68)}),
    Row("tuning, an iteration, nothing cached", call("iteration uncached"),
        predicted={"SD 1.5": (2.79, 0.98), "SDXL": (20.2, 0.91)}),
    Row("iteration: cached to uncached", call("iteration"), call("iteration uncached"), 0.8,
        {"SD 1.5": (2.14, 0.77), "SDXL": (15.2, 0.75)}),
    Row(f"tuning, n = 10, {STEPS} steps, to plain sampling", whole(10), sampling, 0.25 + 0.8 * 10,
        {"SD 1.5": (1150, 8.05), "SDXL": (8250, 7.43)}),
    Row(f"tuning, n = 30, {STEPS} steps, to plain sampling", whole(30), sampling, 0.25 + 0.8 * 30,
        {"SD 1.5": (3380, 23.7), "SDXL": (24300, 21.8)}),
    Row("the same, n = 10, source not kept", whole(10, " bare"), sampling, 0.25 + 0.8 * 10),
    *LORA_ROWS,
]  # fmt: skip


# ---- measuring ------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one run, on the GPU's clock where there is one."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def interleaved(runs: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> tuple[dict, dict]:
    """(seconds of every round, peak bytes) of every run. They take turns; a first round to warm up is dropped."""
    times, peaks = {name: [] for name in runs}, dict.fromkeys(runs, 0)
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            took = seconds(run, device)
            if repeat:
                times[name].append(took)
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device))
    return times, peaks


def measure(family: Family, device: torch.device, options: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Seconds (median, least, most) and peak bytes of every call in Calls, on a device."""
    model = counting.build(family, torch.float16 if device.type == "cuda" else torch.float32, device)
    prompt, sampler = family.prompt(), comfy.k_diffusion.sampling.sample_euler

    def sample(patched: Any, guidance: float = 7.5) -> Callable[[], Any]:
        levels = torch.tensor(inversion.descending_schedule(model, "normal", options.steps, None))
        prompts = {"positive": prompt, "negative": prompt, "guidance": guidance}
        return lambda: host_sampling.sample(patched, sampler, family.latent(), sigmas=levels, **prompts)

    def tune(n: int, patched: Any = model, **chosen: Any) -> Callable[[], Any]:
        chosen = counting.widgets(TuneKV, inner_steps=n, tolerance=0.0, **counting.TUNING | chosen)
        return lambda: TuneKV.execute(patched, trajectory, prompt, negative=prompt, **chosen).args[0]

    def apply(kv: Any, **chosen: Any) -> Any:
        return ApplyKV.execute(model, kv, **counting.widgets(ApplyKV, **chosen)).args[0]

    with torch.inference_mode():
        levels = inversion.descending_schedule(model, "normal", options.tuned_steps, None)
        trajectory = inversion.invert(model, family.latent(), prompt, levels=levels)
        kv, uncached = tune(2)(), counting.without_cache(model)
        steps = {"plain": sample(model), "inversion": sample(model, 1.0)}
        steps |= {name: sample(apply(kv, **chosen)) for name, chosen in counting.APPLIED.items()}
        steps |= {name: sample(counting_masks.masked(model, family, name)) for name in counting_masks.MASKED}
        for name in counting_blends.BLENDED:
            steps[name] = sample(counting_blends.blended(model, family, trajectory, name))
        few, many = 2, 2 + options.iterations
        tunings = {"": {}, " bare": {"keep_source": False}, " uncached": {"patched": uncached}}
        runs = steps | {f"{n}{name}": tune(n, **chosen) for name, chosen in tunings.items() for n in (few, many)}
        times, peaks = interleaved(runs, device, options.repeats)
    rounds = {name: [t / options.steps for t in times[name]] for name in steps}
    peaks = {name: peaks[name] for name in steps} | {f"iteration{kind}": peaks[f"{many}{kind}"] for kind in tunings}
    for kind in tunings:  # per round, so that what slows a whole round cancels
        pairs = list(zip(times[f"{few}{kind}"], times[f"{many}{kind}"], strict=True))
        iterations = [(more - less) / (many - few) / options.tuned_steps for less, more in pairs]
        rounds[f"iteration{kind}"] = iterations
        rounds[f"step{kind}"] = [
            less / options.tuned_steps - (few - 1) * one for (less, _), one in zip(pairs, iterations, strict=True)
        ]
    found = {name: (statistics.median(t), min(t), max(t), peaks.get(name, 0)) for name, t in rounds.items()}
    comfy.model_management.unload_all_models()
    return found


# ---- the table ------------------------------------------------------------------------------------------------------


def count(model: Any, family: Family) -> tuple[dict[str, counting.Cost], dict[str, float]]:
    """(cost of every call, bytes of a picture's embeddings over all steps)."""
    calls = Calls(model, family)
    masked = {name: counting_masks.masked(model, family, name) for name in counting_masks.MASKED}
    masked = {name: counting_masks.later_step(patched, family) for name, patched in masked.items()}
    blended = {name: counting_blends.step(calls, name) for name in counting_blends.BLENDED}
    names = ["plain", "inversion", *counting.APPLIED, *(f"{part}{kind}" for kind in ("", " bare", " uncached")
                                                        for part in ("step", "iteration"))]  # fmt: skip
    sizes = {
        FULL: calls.bytes(keep_source=False),
        f"rank {counting.RANK}": calls.bytes(keep_source=False, rank=counting.RANK),
    }
    sizes |= {
        f"{FULL}, source kept": calls.bytes(),
        f"rank {counting.RANK}, source kept": calls.bytes(rank=counting.RANK),
    }
    return {name: calls[name] for name in names} | masked | blended, sizes


def taught(model: Any, family: Family, ours: bool) -> dict[str, counting.Cost]:
    """Steps of Train LoRA and, unless it is ours alone, of the host's own trainer."""
    steps = {name: counting_lora.step(model, family, name) for name in counting_lora.TAUGHT}
    return steps if ours else steps | counting_host_lora.steps(family)


def of_trainers(model: Any, family: Family, calls: dict) -> list[dict]:
    """The lines that set Train LoRA beside plain sampling and the host's trainer."""
    lines = counting_host_lora.compared(calls) + counting_host_lora.of_memory(model, family, calls)
    return [line | {"": f"{family.name}: {line['']}"} for line in lines]


HEAD = ("", "TFLOP", "GB", "ops", "waits", "saved GB", "copied GB", "H200 ms", "4090 ms", "ratio", "goal", "predicted",
        "measured")  # fmt: skip


def table(family: Family, calls: dict, sizes: dict, times: dict | None, rows: Sequence[Row] = ROWS) -> list[dict]:
    """One dictionary of cells a line, with HEAD's keys."""
    lines = []
    for row in rows:
        if row.needs and row.needs not in calls:
            continue
        cost, than = row.cost(calls), row.than(calls)
        ratio = max(cost.h200 / than.h200, cost.rtx4090 / than.rtx4090)
        line = {"": f"{family.name}: {row.name}", "TFLOP": cost.flops / 1e12, "GB": cost.bytes / 1e9}
        line |= {"ops": cost.ops, "waits": cost.waits, "saved GB": cost.saved / 1e9, "copied GB": cost.copied / 1e9}
        line |= {"H200 ms": cost.h200 * 1e3, "4090 ms": cost.rtx4090 * 1e3, "ratio": ratio, "goal": row.goal}
        ms, share = (row.predicted or {}).get(family.name, (None, None))
        foretold = [None if ms is None else duration(ms / 1e3), None if share is None else f"x {share:g}"]
        line["predicted"] = ", ".join(filter(None, foretold))
        if row.name.startswith("tuning") or row.than is sampling:
            line["waits"] = None  # on CUDA losses are read one iteration late, without waiting; here they are not
        if row.than is sampling or (row.needs and "checkpointing" in row.name):
            line["saved GB"] = None  # torch's checkpoints keep what they keep where the hooks that count cannot see it
        if times is not None and row.timed:
            taken = {name: found[0] for name, found in times.items()}
            line["measured"] = f"{duration(row.cost(taken))}, x {row.cost(taken) / row.than(taken):.3g}"
        lines.append(line)
    if times is not None and times["plain"][3]:
        tuning, plain = times["iteration"][3], times["plain"][3]
        goal, predicted = {"SD 1.5": (1.4, "x 1.25"), "SDXL": (1.8, "x 1.7")}.get(family.name, (None, ""))
        line = {"": f"{family.name}: peak memory, tuning to plain sampling", "ratio": tuning / plain, "goal": goal}
        lines.append(line | {"predicted": predicted, "measured": f"{tuning / 1e9:.3g} GB"})
    limits = {"SD 1.5": (0.11, "x 0.106"), "SDXL": (0.06, "x 0.057")}
    for name, size in sizes.items():
        goal, predicted = limits.get(family.name, (None, "")) if name == f"rank {counting.RANK}" else (None, "")
        lines.append({"": f"{family.name}: file, {STEPS} steps, {name}", "GB": size / 1e9, "ratio": size / sizes[FULL],
                      "goal": goal, "predicted": predicted})  # fmt: skip
    return lines


def of_transformer(family: counting_transformers.Transformer) -> list[dict]:
    """The lines of a transformer: its steps to its plain step, and the size of what is kept of a step."""
    calls, sizes = counting_transformers.count(family)
    than, lines = calls[counting_transformers.PLAIN], []
    for name, cost in calls.items():
        _, goal = counting_transformers.STEPS.get(name, (None, None))
        rows = f", guidance {family.guidance:g}" if name == counting_transformers.PLAIN else ""
        lines.append({
            "": f"{family.name}: {name}{rows}", "TFLOP": cost.flops / 1e12, "GB": cost.bytes / 1e9, "ops": cost.ops,
            "waits": cost.waits, "saved GB": cost.saved / 1e9, "copied GB": cost.copied / 1e9,
            "H200 ms": cost.h200 * 1e3, "4090 ms": cost.rtx4090 * 1e3,
            "ratio": max(cost.h200 / than.h200, cost.rtx4090 / than.rtx4090), "goal": goal,
        })  # fmt: skip
    for kept, size in sizes.items():
        lines.append({"": f"{family.name}: memory of one step, {kept}", "GB": size / 1e9})
    return lines


def duration(took: float) -> str:
    """Seconds as a reader likes them."""
    return f"{took:.3g} s" if took >= 1 else f"{took * 1e3:.3g} ms"


def markdown(lines: list[dict]) -> str:
    """The table. A goal that is missed is followed by an exclamation mark."""
    rows = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for line in lines:
        cells = []
        for name in HEAD:
            value = line.get(name)
            text = "" if value is None else value if isinstance(value, str) else f"{value:.4g}"
            text = f"{value:.0f}" if name in ("ops", "waits") and value is not None else text
            missed = name == "goal" and value is not None and line["ratio"] > value
            cells.append(text + " (!)" * missed)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Parse, count, measure, print, write output/bench."""
    parser = argparse.ArgumentParser(prog="python dev.py bench cost", description=__doc__.splitlines()[0])
    every = [*counting.FAMILIES, *counting_transformers.TRANSFORMERS]
    parser.add_argument("--family", choices=every, nargs="*", default=every)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else None, help="measure here, too")
    parser.add_argument("--tiny", action="store_true", help="the tests' small network instead of the families")
    parser.add_argument("--lora", action="store_true", help="the U-Nets' trainings alone, counted")
    parser.add_argument("--ours", action="store_true", help="without the host's trainer, which takes minutes to count")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of a measured sampling")
    parser.add_argument("--tuned-steps", type=int, default=4, help="of a measured tuning")
    parser.add_argument("--iterations", type=int, default=4, help="inner iterations that tell two tunings apart")
    parser.add_argument("--output", default="output/bench")
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else None
    lines, times = [], {}
    unets = [counting.FAMILIES[name] for name in options.family if name in counting.FAMILIES]
    for family in [counting.TINY] if options.tiny else unets:
        model = counting.build(family)
        if options.lora:
            calls, sizes = {"plain": counting.sampling_step(model, family, 7.5)}, {}
        else:
            calls, sizes = count(model, family)
            if device is not None:
                times[family.name] = measure(family, device, options)
        calls |= taught(model, family, options.ours)
        rows = [ROWS[0], *LORA_ROWS] if options.lora else ROWS
        lines += table(family, calls, sizes, times.get(family.name), rows) + of_trainers(model, family, calls)
    others = [] if options.tiny or options.lora else options.family
    transformers = [counting_transformers.TRANSFORMERS.get(name) for name in others]
    for family in filter(None, transformers):
        lines += of_transformer(family)
    shown = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else options.device
    about = {"torch": torch.__version__, "ComfyUI": comfyui_version.__version__, "machine": platform.machine()}
    about |= {"device": shown, "roofs": counting.DEVICES}
    print(markdown(lines))
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "cost.md").write_text(markdown(lines) + "\n", encoding="utf-8")
    found = {"about": about, "rows": lines, "seconds (median, least, most) and peak bytes": times}
    (output / "cost.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
