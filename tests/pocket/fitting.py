"""What the pocket's trainings share: what the command line says, the loop, pairs of scenes, captions, the host."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

if __package__:
    from . import autoencoder as autoencoding
    from . import checkpoint, parallel, text_encoder, world
else:  # run as a program: its own folder is on the path
    import autoencoder as autoencoding
    import checkpoint
    import parallel
    import text_encoder
    import world

PAIR_SEED = 6  # of the scenes; world.HELD_OUT_SEED stays out of training
SHARE_OF_SIGNS = 1 / 3
_kept = []  # modules whose declarations go with them


@dataclass
class Options:
    """What the command line says; defaults depend on the device."""

    work: Path
    device: str
    processes: int
    seed: int = 0
    init: Path | None = None
    minutes: float | None = None
    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    images: int = 6000
    pairs: int = 6000
    channels: int = autoencoding.LATENT_CHANNELS
    compile: bool = False
    resume: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def autocast(self):
        return autoencoding.autocast(self.device)


# --------------------------------------------------------------------------------------------------- the common loop


def fit(
    model: nn.Module,
    averager: parallel.Averager,
    loss: Callable[[], tuple[Tensor, dict[str, float]]],
    options: Options,
    *,
    lr: float,
    weight_decay: float,
    ema_decay: float,
    warm_up: int,
    state: Path,
    save: Callable[[dict[str, Tensor]], None],
) -> None:
    """Minimise `loss()` with AdamW, cosine decay, gradient clipping at 1 and an average of the weights (EMA).

    Ends after options.steps or options.minutes, whichever comes first; `save` gets the averaged parameters. Every few
    minutes the whole state is written to the file `state`; with options.resume the run goes on from there.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = list(parameters.values())
    averager.join(averager.rank, tensors)
    optimizer = torch.optim.AdamW(tensors, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    average = [p.detach().clone() for p in tensors]
    step, earlier = _resume(state, parameters, average, optimizer) if options.resume else (0, 0.0)
    first, begin = step, time.time()
    told = saved = begin
    seen = []

    def keep() -> None:
        save(dict(zip(parameters, average, strict=True)))
        _write_state(state, parameters, average, optimizer, step, earlier + time.time() - begin)

    while True:
        timed = averager.agree(_share(earlier + time.time() - begin, _seconds(options.minutes)))
        done = max(_share(step, options.steps), timed)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warm_up) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        value, shown = loss()
        value.backward()
        averager.average()
        nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(average, [p.data for p in tensors], 1 - min(ema_decay, (step + 1) / (step + 10)))
        seen.append(shown)
        if averager.rank == 0 and time.time() - told > 30:
            told = time.time()
            rate = (step - first) / (told - begin)
            print(f"{told - begin:6.0f}s step {step} {_means(seen)} {rate:.2f} steps/s", flush=True)
            seen = []
        if averager.rank == 0 and time.time() - saved > 240:
            saved = time.time()
            keep()
    if averager.rank == 0:
        print(f"{time.time() - begin:6.0f}s step {step} {_means(seen)} done", flush=True)
        keep()


def _write_state(
    path: Path,
    parameters: dict[str, Tensor],
    average: list[Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    state = {"model": parameters, "average": average, "optimizer": optimizer.state_dict()}
    temporary = path.with_suffix(".part")
    torch.save(state | {"step": step, "seconds": seconds}, temporary)
    os.replace(temporary, path)


def _resume(
    path: Path, parameters: dict[str, Tensor], average: list[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Fill everything from the file, if there is one; the steps and seconds that were done."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for (name, parameter), mean in zip(parameters.items(), average, strict=True):
            parameter.copy_(state["model"][name])
            mean.copy_(state["average"][list(parameters).index(name)])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _share(done: float, whole: float | None) -> float:
    return done / whole if whole else 0.0


def _seconds(minutes: float | None) -> float | None:
    return 60 * minutes if minutes else None


def _means(seen: list[dict[str, float]]) -> str:
    names = dict.fromkeys(name for shown in seen for name in shown)
    return " ".join(f"{n} {np.mean([shown[n] for shown in seen if n in shown]):.4f}" for n in names)


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    temporary = path.with_suffix(".part")
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file({n: v.half() if v.is_floating_point() else v for n, v in state.items()}, temporary, metadata)
    temporary.chmod(0o644)  # the writer makes files that only their owner can read
    os.replace(temporary, path)


# -------------------------------------------------------------------------------------------------- pictures and host


def pair_of_scenes(index: int) -> tuple[world.Scene, world.Scene]:
    """One animal in two poses; sometimes on the other side or looking the other way; a third with one sign in both."""
    rng = np.random.default_rng([PAIR_SEED, index])
    first = world.sample_scene(rng)
    others = [pose for pose in world.POSES if pose != first.pose]
    second = world.edit(first, pose=others[int(rng.integers(len(others)))])
    if rng.random() < 0.3:
        second = world.edit(second, side="left" if first.side == "right" else "right")
    if rng.random() < 0.3:
        second = world.edit(second, facing=-first.facing)
    chosen = np.random.default_rng([PAIR_SEED, index, world.SIGN_STREAM])
    return world.add_sign(chosen, first, second) if chosen.random() < SHARE_OF_SIGNS else (first, second)


class Pairs:
    """Pairs of poses by latents.npz: batches of latents with captions, one caption in ten of them empty, for guidance.

    rng: of a process; other draws where an interrupted training goes on.
    """

    def __init__(self, options: Options, rank: int, state: Path):
        started = [state.stat().st_mtime_ns] if options.resume and state.exists() else []
        self.rng = np.random.default_rng([options.seed, rank, *started])
        data = np.load(options.work / "latents.npz")
        self.z = torch.from_numpy(data["z"])
        self.settings = {"latent_mean": str(float(data["mean"])), "latent_std": str(float(data["std"]))}
        self.scenes = [pair_of_scenes(i) for i in range(len(self.z))]

    def draw(self, batch: int, paired: bool) -> tuple[Tensor, list[str]]:
        """(latents (batch, C, 16, 16), captions); paired: rows 2i and 2i + 1 are one pair's, told both or neither."""
        rng = self.rng
        if paired:
            index, which = rng.integers(0, len(self.z), batch // 2).repeat(2), np.tile([0, 1], batch // 2)
            untold = (rng.random(batch // 2) < 0.1).repeat(2)
        else:
            index, which = rng.integers(0, len(self.z), batch), rng.integers(0, 2, batch)
            untold = rng.random(batch) < 0.1
        told = [world.training_caption(self.scenes[i][k], rng) for i, k in zip(index, which, strict=True)]
        return self.z[index, which].float(), ["" if u else text for u, text in zip(untold, told, strict=True)]

    def stratified(self, batch: int) -> np.ndarray:
        """Numbers in 0..1, one in each of `batch` equal parts, in any order; (batch,)."""
        return (self.rng.permutation(batch) + self.rng.random(batch)) / batch


def begin_with(model: nn.Module, init: Path | None) -> None:
    """Load given weights, if there are any."""
    if init:
        given, _ = checkpoint.load_weights(init)
        model.load_state_dict({name: value.float() for name, value in given.items()})


class Captions:
    """Encoded captions, kept in bfloat16."""

    def __init__(self, limit: int = 6000):
        self.encoder, self.limit, self.known = text_encoder.Encoder(), limit, {}

    def __call__(self, texts: list[str]) -> Tensor:
        """Texts -> (B, 77, 768)."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if len(self.known) + len(new) > self.limit:
            self.known, new = {}, list(dict.fromkeys(texts))
        if new:
            self.known |= zip(new, self.encoder(new).bfloat16(), strict=True)
        return torch.stack([self.known[text] for text in texts])


def import_host() -> None:
    """Make the host's modules importable. Exits with a sentence where COMFYUI_PATH leads nowhere."""
    host = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (host / "comfy").is_dir():
        sys.exit("train: set COMFYUI_PATH to a ComfyUI folder; `python dev.py test` sets one up in .dev/")
    if _kept or "comfy.cli_args" in sys.modules:  # here before, by this or by a test's own set-up
        return
    spec = importlib.util.spec_from_file_location("run_host", Path(__file__).parent.parent / "run_host.py")
    run_host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_host)
    run_host.declare_missing_operators()
    _kept.append(run_host)
    if str(host) not in sys.path:
        sys.path.insert(0, str(host))
    arguments, sys.argv = sys.argv, sys.argv[:1]  # the host reads the command line when it is imported
    from comfy.cli_args import args

    sys.argv = arguments
    args.cpu = not torch.cuda.is_available()
    args.use_pytorch_cross_attention = True
