"""Train the judge: python tests/pocket/train.py judge (this module holds the recipe)."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

if __package__:
    from . import autoencoder as autoencoding
    from . import judge as judging
    from . import world
else:
    import autoencoder as autoencoding
    import judge as judging
    import world

SHIFT = 6  # pixels
AREA_WEIGHTS = (2.0, 2.0, 12.0, 4.0, 6.0, 4.0)  # of judging.AREAS: the smaller an area, the more


def areas_of(scenes: list[world.Scene]) -> np.ndarray:
    """The true areas of each scene, uint8 (N, 6, 64, 64) 0..255."""
    out = np.empty((len(scenes), len(judging.AREAS), judging.AREA_SIZE, judging.AREA_SIZE), np.uint8)
    for i, scene in enumerate(scenes):
        parts = world.render_parts(scene, judging.AREA_SIZE)
        out[i] = [(parts[name] * 255).round() for name in judging.AREAS]
    return out


def augment(pictures: Tensor, areas: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Shift, blur, noise and a colour jitter too small to turn one colour into another; one shift and blur per batch.

    pictures (B, 3, 128, 128) in 0..1, areas (B, 6, 64, 64) -> the same shapes.
    """
    size, half = pictures.shape[-1], SHIFT // 2
    top, left = (int(v) for v in rng.integers(0, 2 * half + 1, 2))  # in pixels of the areas
    pictures = F.pad(pictures, (SHIFT,) * 4, mode="replicate")[..., 2 * top :, 2 * left :][..., :size, :size]
    areas = F.pad(areas, (half,) * 4)[..., top:, left:][..., : size // 2, : size // 2]
    if rng.random() < 0.5:
        small = int(rng.integers(size // 2, size))
        pictures = F.interpolate(pictures, size=(small, small), mode="bilinear", antialias=bool(rng.integers(2)))
        pictures = F.interpolate(pictures, size=(size, size), mode="bilinear")
    batch = len(pictures)
    gain = torch.from_numpy(rng.uniform(0.94, 1.06, (batch, 3, 1, 1)).astype(np.float32))
    lift = torch.from_numpy(rng.uniform(-0.03, 0.03, (batch, 3, 1, 1)).astype(np.float32))
    noise = 0.05 * float(rng.random()) * torch.randn_like(pictures)
    return pictures * gain + lift + noise, areas


def mirror(pictures: Tensor, areas: Tensor, classes: dict[str, Tensor]):
    """The mirrored pictures, whose animals stand on the other side and look the other way."""
    swapped = {name: 1 - classes[name] for name in ("side", "facing")}
    return pictures.flip(3), areas.flip(3), classes | swapped


def loss_of(answers: dict[str, Tensor], found: Tensor, classes: dict[str, Tensor], areas: Tensor) -> Tensor:
    """Sum of the attributes' cross entropies and of the areas'; undefined attributes count nothing."""
    entropies = [
        F.cross_entropy(answers[name].float(), target, reduction="sum") / (target >= 0).sum().clamp(min=1)
        for name, target in classes.items()
    ]
    pixels = F.binary_cross_entropy_with_logits(found.float(), areas, reduction="none").mean((0, 2, 3))
    return sum(entropies) + (pixels * torch.tensor(AREA_WEIGHTS, device=pixels.device)).sum()


def accuracy(judge: judging.Judge, images: np.ndarray, scenes: list[world.Scene]) -> dict[str, float]:
    """Share of right answers per attribute, over the scenes that show it."""
    answers, truth = judging.ask(judge, images), judging.labels(scenes)
    right = {name: (answers[name].argmax(1) == target)[target >= 0] for name, target in truth.items()}
    return {name: value.float().mean().item() for name, value in right.items()}


def overlap(judge: judging.Judge, images: np.ndarray, masks: np.ndarray) -> float:
    """Mean intersection over union of the judge's mask with the true one (B, 128, 128) in 0..1."""
    truth = F.avg_pool2d(torch.from_numpy(masks).float()[:, None], 2)[:, 0]
    found, truth = judging.ask(judge, images)["mask"] > 0.5, truth > 0.5
    return ((found & truth).sum((1, 2)) / (found | truth).sum((1, 2)).clamp(min=1)).mean().item()


def train(
    images: np.ndarray,
    areas: np.ndarray,
    scenes: list[world.Scene],
    *,
    steps: int,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    device: str = "cpu",
    init: Path | None = None,
    log=print,
) -> judging.Judge:
    """images uint8 (N, 128, 128, 3), areas uint8 (N, 6, 64, 64) from `areas_of`; a scene may occur several times."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    judge = (judging.load(init) if init else judging.Judge()).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.08)
    truth, begin = judging.labels(scenes), time.time()
    for step in range(steps):
        index = rng.integers(0, len(images), batch)
        pictures = torch.from_numpy(images[index]).movedim(-1, 1).float() / 255
        shown, classes = torch.from_numpy(areas[index]).float() / 255, {n: v[index] for n, v in truth.items()}
        if rng.random() < 0.5:
            pictures, shown, classes = mirror(pictures, shown, classes)
        pictures, shown = augment(pictures, shown, rng)
        pictures = pictures.to(device).contiguous(memory_format=torch.channels_last)
        with autoencoding.autocast(device):
            answers, found = judge(pictures)
        loss = loss_of(answers, found, {n: v.to(device) for n, v in classes.items()}, shown.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            log(f"{time.time() - begin:6.0f}s step {step + 1}/{steps} loss {loss.item():.3f}")
    return judge.eval()


def save(judge: judging.Judge, path: str | Path) -> None:
    """Weights as float16 .safetensors, without the batch counters."""
    state = {name: value for name, value in judge.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file({name: value.cpu().half().contiguous() for name, value in state.items()}, path)
    Path(path).chmod(0o644)  # the writer makes files that only their owner can read
