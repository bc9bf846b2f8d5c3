"""Train the pocket's pose ControlNet for half an hour of one core, the U-Net frozen, as ControlNets are trained.

Half of the steps show pairs of one animal that see each other, as the U-Net's own training does (pocket.train): there
the control has to say a pose against the one that self-attention finds in the other picture, as beside Apply KV.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import numpy as np
import torch
from pocket import autoencoder, checkpoint, parallel, train, world
from pose_control import pocket_control, skeleton
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FILE, STATE = "pose_control.safetensors", "pose_control_state.pt"
UNTOLD = 0.3  # of the captions: then the skeleton alone says what there is to see
NOISIER = 0.7  # t = 1000 u^0.7, u even in 0..1: poses are decided where there is much noise
TOGETHER = {"patches_replace": {"attn1": {(name, i): train.see_partner for name in train.BLOCKS for i in range(12)}}}


class Skeletons:
    """Poses of training's scenes as the hint (3, 128, 128), drawn when they are first asked for."""

    def __init__(self) -> None:
        self.drawn: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, scenes: list, index: np.ndarray, which: np.ndarray) -> Tensor:
        """(B, 3, 128, 128) in 0..1."""
        for i, k in zip(index, which, strict=True):
            if (i, k) not in self.drawn:
                self.drawn[i, k] = skeleton.draw(scenes[i][k])
        hints = np.stack([self.drawn[pair] for pair in zip(index, which, strict=True)])
        return torch.from_numpy(hints).movedim(-1, 1).float() / 255


def frozen(unet: dict[str, Tensor]) -> nn.Module:
    """The narrow U-Net, which does not learn."""
    model = train.build_unet()
    model.load_state_dict({name: value.float() for name, value in unet.items()})
    return model.to(memory_format=train.CHANNELS_LAST).requires_grad_(False).eval()


def cloned(h: Tensor, options: dict) -> Tensor:
    """Input block patch behind the skip: the next block reads a copy, for the host adds the control to the skip."""
    return h.clone()


def predict(unet: nn.Module, control: nn.Module, noisy: Tensor, t: Tensor, context: Tensor, hint: Tensor, paired: bool):
    """The noise that the U-Net sees beside the control."""
    said = control(x=noisy, hint=hint, timesteps=t, context=context)
    options = {"patches": {"input_block_patch_after_skip": [cloned]}} | (TOGETHER if paired else {})
    return unet(noisy, t, context=context, control=said, transformer_options=options)


def train_control(averager: parallel.Averager, rank: int, options: train.Options) -> None:
    """Predict the noise, told the pose by a skeleton; the loss of pocket.train.train_unet on its pairs of latents."""
    averager.rank, state = rank, options.work / STATE
    started = [state.stat().st_mtime_ns] if options.resume and state.exists() else []  # other draws than before
    rng = np.random.default_rng([options.seed, rank, *started])
    z = torch.from_numpy(np.load(options.work / "latents.npz")["z"])
    scenes, hints = [train.pair_of_scenes(i) for i in range(len(z))], Skeletons()
    unet, _ = checkpoint.load_weights(options.init or checkpoint.WEIGHTS / checkpoint.UNET)
    captions, alphas, network = train.Captions(), train.alphas_cumprod(), frozen(unet)
    control = pocket_control.begun(unet, options.seed).to(memory_format=train.CHANNELS_LAST).train()
    torch.manual_seed(int(rng.integers(1 << 31)))
    batch, steps = options.batch or 8, itertools.count()
    plain = autoencoder.has_bfloat16()  # then the plain attention is faster backwards than the fused one

    def draw_batch(paired: bool) -> tuple[np.ndarray, np.ndarray]:
        if paired:
            return rng.integers(0, len(z), batch // 2).repeat(2), np.tile([0, 1], batch // 2)
        return rng.integers(0, len(z), batch), rng.integers(0, 2, batch)

    def loss() -> tuple[Tensor, dict[str, float]]:
        paired = next(steps) % 2 == 1
        index, which = draw_batch(paired)
        told = [world.training_caption(scenes[i][k], rng) for i, k in zip(index, which, strict=True)]
        context = captions(["" if rng.random() < UNTOLD else text for text in told]).float()
        u = (rng.permutation(batch) + rng.random(batch)) / batch
        t = torch.from_numpy((1000 * u**NOISIER).astype(np.int64))
        clean, alpha = z[index, which].float(), alphas[t][:, None, None, None]
        noise = torch.randn_like(clean)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=train.CHANNELS_LAST)
        hint = hints(scenes, index, which).contiguous(memory_format=train.CHANNELS_LAST)
        with options.autocast(), sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            predicted = predict(network, control, noisy, t, context, hint, paired)
        errors, snr = (predicted.float() - noise).square().mean((1, 2, 3)), (alpha / (1 - alpha)).flatten()
        value = ((snr.clamp(max=5) / snr).sqrt() * errors).mean()
        return value, {"pair" if paired else "single": errors.detach().mean().item(), "loss": value.item()}

    def save(average: dict[str, Tensor]) -> None:
        pocket_control.save(options.work / FILE, average, {})

    recipe = {"lr": options.lr or 1.5e-3, "weight_decay": 0.01, "ema_decay": 0.995, "warm_up": 100}
    train.fit(control, averager, loss, options, **recipe, state=state, save=save)


def trained_of(work: Path) -> dict[str, Tensor]:
    """The averaged parameters that a training wrote, unpacked."""
    return checkpoint.load_weights(work / FILE)[0]


def count() -> int:
    """Numbers that are trained."""
    unet, _ = checkpoint.load_weights(checkpoint.WEIGHTS / checkpoint.UNET)
    return sum(p.numel() for p in pocket_control.begun(unet, 0).parameters() if p.requires_grad)
