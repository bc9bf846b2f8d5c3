"""What is worth doing where a GPU is at hand for some minutes: measure first, then train the pocket model further.

    python dev.py gpu --minutes 8              everything, into output/gpu
    python dev.py gpu --device cpu --tiny      the same path in small, anywhere

Offline it needs the checkout, an unpacked ComfyUI (`--host FOLDER`) and a Python with what that requires, torch for the
GPU, requests and kornia among it. Parts, in this order, each with a share of the time; a part that fails or runs out of
time is noted and the next one begins:

cost: wall times and peak memory of all that `bench cost` counts, SD 1.5 and SDXL with random weights, the kinds of call
taking turns with the host's plain step. attention: scaled dot product attention at the families' largest layers with no
mask, with a bias, and with twice the keys. graph: an iteration of a tuning (forward, backward, Adam) as it is and as a
captured CUDA graph. autoencoder, latents, unet: `tests/pocket/train.py` from the weights in `--init`, else the shipped.

The output folder holds gpu.json (device, versions, what each part took and said), cost.md, cost.json and the weights:
at most 8 files of at most 16 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comfyui_version
import torch
from benchmarks import counting
from cost.benchmark import interleaved
from torch.nn.functional import scaled_dot_product_attention

TESTS = Path(__file__).resolve().parent
SHARES = {"cost": 0.4, "attention": 0.03, "graph": 0.05, "autoencoder": 0.12, "latents": 0.1, "unet": 0.3}
LAYERS = {"SD 1.5, 512 px": (8, 4096, 40), "SDXL, 1024 px": (10, 4096, 64)}  # heads, tokens, width of a head
MOST_BYTES, MOST_FILES = 16 * 2**20, 8
KEPT = ("cost.md", "cost.json", "autoencoder.safetensors", "unet.safetensors")


def main() -> int:
    """Run the parts, write gpu.json after each."""
    parser = argparse.ArgumentParser(
        prog="python dev.py gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps: does everything run?")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument(
        "--init", type=Path, default=TESTS / "pocket" / "weights", help="folder of weights to go on from"
    )
    parser.add_argument("--output", type=Path, default=Path("output/gpu"))
    options = parser.parse_args()
    work = options.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    found = {"about": about(options.device), "parts": {}}
    for part in options.parts:
        began = time.monotonic()
        found["parts"][part] = said = attempt(part, options, work)
        said["seconds"] = round(time.monotonic() - began, 1)
        print(f"{part}: {said['seconds']:.0f} s, {said.get('error', 'done')}", flush=True)
        bring(work, options.output)
        (options.output / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def about(device: str) -> dict[str, str]:
    """Device, versions."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "CUDA": str(torch.version.cuda), "ComfyUI": comfyui_version.__version__}
    return {"device": name, **versions, "Python": platform.python_version()}


def attempt(part: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run one part within its share of the time; {error} where it did not end well."""
    seconds = 60 * options.minutes * SHARES[part]
    try:
        if part in MEASURED:
            return MEASURED[part](torch.device(options.device), options.tiny)
        return by_command(COMMANDS[part](options, work, seconds), seconds, work / f"{part}.log")
    except (RuntimeError, ValueError, torch.AcceleratorError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}


# ------------------------------------------------------------------------------------------------ parts with a command


def by_command(command: list[str], seconds: float, log: Path) -> dict[str, Any]:
    """Run a command with a little more than its time, its output in a file."""
    env = {**os.environ, "COMFYUI_PATH": os.environ.get("COMFYUI_PATH", "")}
    with log.open("w", encoding="utf-8") as stream:
        try:
            done = subprocess.run(command, env=env, stdout=stream, stderr=subprocess.STDOUT, timeout=seconds * 1.5 + 60)
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {seconds * 1.5 + 60:.0f} s"}
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return {"said": last} if done.returncode == 0 else {"error": f"exit code {done.returncode}", "said": last}


def cost(options: argparse.Namespace, work: Path, seconds: float) -> list[str]:
    small = ["--tiny", "--repeats", "1", "--steps", "2", "--tuned-steps", "2", "--iterations", "1"]
    rest = small if options.tiny else ["--repeats", "3", "--steps", "10"]
    script = [sys.executable, str(TESTS / "prepared.py"), "cost.benchmark"]
    return [*script, "--ours", "--device", options.device, "--output", str(work), *rest]


def training(stage: str) -> Callable[[argparse.Namespace, Path, float], list[str]]:
    """A stage of tests/pocket/train.py that goes on from given weights."""

    def command(options: argparse.Namespace, work: Path, seconds: float) -> list[str]:
        script = [sys.executable, str(TESTS / "pocket" / "train.py"), stage, "--work", str(work)]
        script += ["--device", options.device]
        length = ["--minutes", f"{seconds / 60:.2f}"]
        if options.tiny:
            length = ["--steps", "2", "--batch", "2", "--processes", "1"]
        name = "autoencoder" if stage == "autoencoder" else "unet"
        size = {"autoencoder": "--images", "latents": "--pairs", "unet": "--pairs"}[stage]
        count = {"--images": "64" if options.tiny else "6000", "--pairs": "256" if options.tiny else "4096"}[size]
        return [*script, "--init", str(options.init / f"{name}.safetensors"), size, count, *length]

    return command


COMMANDS = {
    "cost": cost,
    "autoencoder": training("autoencoder"),
    "latents": training("latents"),
    "unet": training("unet"),
}


# --------------------------------------------------------------------------------------------------- parts in this one


def attention(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Median milliseconds of the largest layers' attention in a guided step: plain, biased, with twice the keys."""
    dtype, found = torch.float16 if device.type == "cuda" else torch.float32, {}
    for name, (heads, tokens, width) in LAYERS.items():
        tokens = tokens // 16 if tiny else tokens
        q, k, v = (torch.randn(2, heads, tokens, width, device=device, dtype=dtype) for _ in range(3))
        bias, twice = (
            torch.zeros(1, 1, tokens, tokens, device=device, dtype=dtype),
            [torch.cat([t, t], 2) for t in (k, v)],
        )
        runs = {
            "plain": partial(scaled_dot_product_attention, q, k, v),
            "bias": partial(scaled_dot_product_attention, q, k, v, attn_mask=bias),
            "twice the keys": partial(scaled_dot_product_attention, q, *twice),
        }
        times, _ = interleaved(runs, device, 2 if tiny else 20)
        found[name] = {kind: 1000 * statistics.median(t) for kind, t in times.items()}
    return {"milliseconds": found}


def graph(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Median milliseconds of an iteration that learns a layer's input, as it is and as a captured graph."""
    family = counting.TINY if tiny else counting.FAMILIES["SD 1.5"]
    model = counting.build(family, torch.float16 if device.type == "cuda" else torch.float32, device)
    network = model.model.diffusion_model
    for module in network.modules():  # made in inference mode, whose tensors autograd refuses
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
    x = family.latent().to(device, network.dtype)
    text = family.prompt()[0][0].to(device, network.dtype)
    learned = torch.zeros_like(text, dtype=torch.float32, requires_grad=True)
    optimiser = torch.optim.Adam([learned], 1e-3, capturable=device.type == "cuda")
    t = torch.full((len(x),), 500.0, device=device)

    def iteration() -> None:
        optimiser.zero_grad(set_to_none=False)
        network(x, t, context=text + learned.to(text.dtype)).float().square().mean().backward()
        optimiser.step()

    learned.grad = torch.zeros_like(learned)
    runs = {"as it is": iteration}
    if device.type == "cuda":
        runs["captured"] = captured(iteration)
    times, _ = interleaved(runs, device, 2 if tiny else 10)
    return {"milliseconds": {name: 1000 * statistics.median(t) for name, t in times.items()}}


def captured(iteration: Callable[[], None]) -> Callable[[], None]:
    """The iteration as a CUDA graph, after three on a side stream, as capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            iteration()
    torch.cuda.current_stream().wait_stream(side)
    whole = torch.cuda.CUDAGraph()
    with torch.cuda.graph(whole):
        iteration()
    return whole.replay


MEASURED = {"attention": attention, "graph": graph}


def bring(work: Path, output: Path) -> None:
    """Copy what is kept out of the work folder; leave out what is larger than may be brought back."""
    for name in KEPT[: MOST_FILES - 1]:
        if (work / name).is_file() and (work / name).stat().st_size <= MOST_BYTES:
            shutil.copyfile(work / name, output / name)


if __name__ == "__main__":
    sys.exit(main())
