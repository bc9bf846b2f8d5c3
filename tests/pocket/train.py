"""Train the pocket model, on a CPU or a GPU, from one seed.

    python tests/pocket/train.py all --work DIR                       everything from nothing
    python tests/pocket/train.py autoencoder --work DIR --minutes 20 --init weights/autoencoder.safetensors
    python tests/pocket/train.py latents --work DIR --pairs 6000
    python tests/pocket/train.py unet --work DIR --minutes 60 --init weights/unet.safetensors
    python tests/pocket/train.py judge --work DIR --steps 3000
    python tests/pocket/train.py autoencoder --channels 16 --work OTHER; ... latents; ... transformer

Every stage reads what the stages before it left in DIR and writes a .safetensors there. The last line is for the pocket
transformer, whose latents have 16 channels; `all` leaves it out. `--init` continues from given weights; `--resume` goes
on with an interrupted training of the autoencoder, the U-Net or the transformer. A CPU runs two single-threaded
processes that average their gradients, in bfloat16 where it has it; a GPU runs one with larger batches. The networks
are the host's own classes: set COMFYUI_PATH to a ComfyUI folder.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if __package__:
    from . import autoencoder as autoencoding
    from . import checkpoint, metrics, parallel, text_encoder, train_judge, transformer, world
    from .fitting import (
        SHARE_OF_SIGNS,
        Captions,
        Options,
        Pairs,
        begin_with,
        fit,
        import_host,
        pair_of_scenes,
        save_weights,
    )
else:  # run as a program: its own folder is on the path
    import autoencoder as autoencoding
    import checkpoint
    import metrics
    import parallel
    import text_encoder
    import train_judge
    import transformer
    import world
    from fitting import (
        SHARE_OF_SIGNS,
        Captions,
        Options,
        Pairs,
        begin_with,
        fit,
        import_host,
        pair_of_scenes,
        save_weights,
    )

TRAINING_SEED, VALIDATION_SEED = 1, 99  # of the scenes; world.HELD_OUT_SEED stays out of training
PART = 256  # pairs encoded into one file
WIDTH = 160  # half of SD1.5's: checkpoint.widen doubles it
CHANNELS_LAST = torch.channels_last
BLOCKS = ("input", "middle", "output")  # as the host names them


# ----------------------------------------------------------------------------------------------------------- pictures


def drawn(
    options: Options, name: str, seed: int, n: int, signs: float = 0.0
) -> tuple[np.ndarray, np.ndarray, list[world.Scene]]:
    """Pictures uint8 (n, 128, 128, 3), animals' masks uint8 (n, 128, 128) and scenes, a share of them with a sign.

    They are drawn once and kept in the work folder.
    """
    path, story = options.work / f"{name}.npz", options.work / f"{name}.json"
    if not (path.exists() and story.exists()):
        pool_size = os.cpu_count() if options.on_gpu else options.processes
        with multiprocessing.get_context("spawn").Pool(pool_size) as pool:
            rows = pool.starmap(_draw, [(seed, i, signs) for i in range(n)], chunksize=50)
        np.savez(path, images=np.stack([row[0] for row in rows]), masks=np.stack([row[1] for row in rows]))
        story.write_text(json.dumps([asdict(row[2]) for row in rows]), encoding="utf-8")
    data = np.load(path)
    scenes = [world.Scene.from_dict(values) for values in json.loads(story.read_text(encoding="utf-8"))]
    return data["images"], data["masks"], scenes


def _draw(seed: int, index: int, signs: float) -> tuple[np.ndarray, np.ndarray, world.Scene]:
    scene = world.sample_scene(np.random.default_rng([seed, index]))
    chosen = np.random.default_rng([seed, index, world.SIGN_STREAM])
    if chosen.random() < signs:
        (scene,) = world.add_sign(chosen, scene)
    image, mask = world.render(scene, with_mask=True)
    return image, (mask * 255).astype(np.uint8), scene


def focus_of(scenes: list[world.Scene], masks: np.ndarray) -> np.ndarray:
    """Where the autoencoder has to be sharp, uint8 (n, 128, 128): in the board of a sign, else in the animal."""
    focus = masks.copy()
    for i, scene in enumerate(scenes):
        if scene.sign:
            focus[i] = world.render_parts(scene)["board"] * 255
    return focus


# -------------------------------------------------------------------------------------------------------- autoencoder


def train_autoencoder(averager: parallel.Averager, rank: int, options: Options) -> None:
    """64 px crops around the animal, or the board of a sign; errors inside its mask count four times.

    With given weights the latents are held near theirs, so that a U-Net trained on those stays valid; from nothing, or
    with more channels than the given weights have, they are drawn to mean 0 and variance 1. With more channels, the
    encoder's fine layers are held, too: what they find is far more than the old channels let through.
    """
    averager.rank, crop = rank, 64
    rng = np.random.default_rng([options.seed, rank])
    images, masks, scenes = drawn(options, "train", TRAINING_SEED, options.images, SHARE_OF_SIGNS)
    masks = focus_of(scenes, masks)
    centres = np.stack([[np.average(np.arange(128), weights=m.sum(axis) + 1e-6) for axis in (1, 0)] for m in masks])
    model, anchor = autoencoding.Autoencoder(options.channels), None
    if options.init:
        model = given = autoencoding.load(options.init)
        if given.channels == options.channels:
            anchor = autoencoding.load(options.init, options.device).taesd_encoder
        else:
            model = given.with_channels(options.channels, options.seed)
            model.hold_fine_encoder()
    else:
        model.initialise(options.seed)
    model = model.to(options.device, memory_format=CHANNELS_LAST).train()
    torch.manual_seed(options.seed + rank)
    batch = options.batch or (64 if options.on_gpu else 8)

    def loss() -> tuple[Tensor, dict[str, float]]:
        index = rng.integers(0, len(images), batch)
        jitter = np.stack([rng.integers(-20, 21, batch), rng.integers(-24, 25, batch)], 1)
        corners = np.clip(centres[index] - crop / 2 + jitter, 0, 128 - crop).astype(int)
        windows = [(i, slice(y, y + crop), slice(x, x + crop)) for i, (y, x) in zip(index, corners, strict=True)]
        pictures = to_pictures(np.stack([images[w] for w in windows]), options)
        weight = 1 + 3 * torch.from_numpy(np.stack([masks[w] for w in windows]))[:, None].to(options.device) / 255
        if rng.random() < 0.5:
            pictures, weight = pictures.flip(3).contiguous(memory_format=CHANNELS_LAST), weight.flip(3)
        with options.autocast():
            latents = model.encode(pictures).float()
            decoded = model.decode(latents + 0.05 * torch.randn_like(latents)).float()
            with torch.no_grad():
                target = anchor(pictures).float() if anchor else None
        error = decoded - pictures
        if anchor:
            tether = 0.15 * (latents - target).square().mean()
        else:
            power, mean = latents.square().mean((0, 2, 3)), latents.mean((0, 2, 3))
            tether = 0.01 * ((power - 1).square() + mean.square()).mean()
        total = (weight * error.abs()).mean() + 6 * (weight * error.square()).mean() + tether
        return total, {"loss": total.item(), "mse": error.square().mean().item()}

    def save(average: dict[str, Tensor]) -> None:
        save_weights(options.work / checkpoint.AUTOENCODER, model.state_dict() | average)

    lr = options.lr or (3e-4 if options.init else 1e-3)
    recipe = {"lr": lr, "weight_decay": 0.0, "ema_decay": 0.998, "warm_up": 50}
    fit(model, averager, loss, options, **recipe, state=options.work / "autoencoder_state.pt", save=save)


def to_pictures(images: np.ndarray, options: Options) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in 0..1 on the device."""
    pictures = torch.from_numpy(images).to(options.device).movedim(-1, 1).float() / 255
    return pictures.contiguous(memory_format=CHANNELS_LAST)


def report_autoencoder(options: Options) -> None:
    """Print the held-out PSNR: whole picture, animal, background."""
    images, masks, _ = drawn(options, "validation", VALIDATION_SEED, 300)
    original = metrics.to_float(images[:48])
    model = autoencoding.load(options.work / checkpoint.AUTOENCODER, options.device)
    decoded, animal = autoencoding.round_trip(model, original), torch.from_numpy(masks[:48] > 127).float()
    parts = {"all": None, "animal": animal, "background": 1 - animal}
    values = {name: metrics.psnr(decoded, original, mask).mean().item() for name, mask in parts.items()}
    print("autoencoder PSNR " + " ".join(f"{name} {value:.2f}" for name, value in values.items()), flush=True)


# ------------------------------------------------------------------------------------------------------------ latents


def encode_pairs(options: Options) -> None:
    """Draw and encode pairs: latents.npz with z float16 (n, 2, 4, 16, 16), normalised, and the mean and std used.

    With given U-Net weights their mean and std are used again; else those of the latents. Parts of 256 pairs are kept
    in the folder `latents`: an interrupted run goes on, and more pairs can be added later.
    """
    path = _first_existing(options.work / checkpoint.AUTOENCODER, autoencoding.WEIGHTS)
    folder = options.work / "latents"
    folder.mkdir(exist_ok=True)
    parts = {low: folder / f"{low:06d}.npy" for low in range(0, options.pairs, PART)}
    jobs = [(path, part, low, options.device) for low, part in parts.items() if not part.exists()]
    if options.on_gpu:
        for job in jobs:
            _encode(*job)
    else:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            pool.starmap(_encode, jobs, chunksize=1)
    latents = torch.from_numpy(np.concatenate([np.load(part) for part in parts.values()])[: options.pairs]).float()
    mean, std = latents.mean().item(), latents.std().item()
    if options.init:
        _, settings = checkpoint.load_weights(options.init)
        mean, std = float(settings["latent_mean"]), float(settings["latent_std"])
    z = ((latents - mean) / std).half().numpy()
    np.savez(options.work / "latents.npz", z=z, mean=mean, std=std)
    print(
        f"{len(z)} pairs, mean {mean:.4f}, std {std:.4f}; normalised std {z.astype(np.float32).std():.3f}", flush=True
    )


def _encode(path: Path, part: Path, low: int, device: str) -> None:
    """Write latents float16 (256, 2, 4, 16, 16) of the pairs from `low` on to the file `part`."""
    if device == "cpu":
        torch.set_num_threads(1)
    model, out = autoencoding.load(path, device), []
    for start in range(low, low + PART, 8):
        scenes = [scene for i in range(start, start + 8) for scene in pair_of_scenes(i)]
        pictures = torch.from_numpy(np.stack([world.render(scene) for scene in scenes])).to(device).movedim(-1, 1) / 255
        with torch.no_grad(), autoencoding.autocast(device):
            out.append(model.encode(pictures.contiguous(memory_format=CHANNELS_LAST)).half().cpu().contiguous())
    temporary = part.with_suffix(".part.npy")
    np.save(temporary, torch.cat(out).unflatten(0, (-1, 2)).numpy())
    os.replace(temporary, part)
    print(f"pairs {low} to {low + PART - 1} encoded", flush=True)


def _first_existing(*paths: Path) -> Path:
    return next((path for path in paths if path.exists()), paths[-1])


# -------------------------------------------------------------------------------------------------------------- U-Net


def build_unet(width: int = WIDTH) -> nn.Module:
    """The host's UNetModel: two levels, one residual block each, attention in every block, 8 heads.

    A narrow one takes the 320 sinusoidal time features of the full layout, so that `checkpoint.widen` is exact.
    """
    import_host()
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    model = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=width,
        channel_mult=[1, 1],
        num_res_blocks=[1, 1],
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        num_heads=8,
        num_head_channels=-1,
        context_dim=text_encoder.WIDTH,
        use_spatial_transformer=True,
        legacy=False,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    if width != 320:
        model.model_channels = 320
        model.time_embed[0] = comfy.ops.disable_weight_init.Linear(320, width * 4)
    for name, module in model.named_modules():  # the host's layers come without initial weights
        if isinstance(module, nn.Conv2d):
            nn.Conv2d.reset_parameters(module)
        elif isinstance(module, nn.Linear):
            nn.Linear.reset_parameters(module)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":  # each block starts as the identity
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def alphas_cumprod() -> Tensor:
    """SD's scaled-linear schedule: beta_t between 0.00085 and 0.012, linear in sqrt(beta); (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def see_partner(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
    """Self-attention of rows 2i and 2i + 1 to both their keys and values; (B, N, C), heads not split."""

    def both(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)], 1)

    q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (query, both(key), both(value)))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def train_unet(averager: parallel.Averager, rank: int, options: Options) -> None:
    """Predict the noise in pictures, two steps of three in pairs of poses of one animal that see each other.

    In a pair every self-attention layer also attends to the partner's keys and values (`see_partner`). The partners
    have noise levels of their own: the noisier one can only learn the animal's hidden attributes by looking at the
    cleaner one, so self-attention learns to look an animal up elsewhere, as large models learn from many pictures that
    show one thing twice. The function of the network on single pictures stays an ordinary U-Net's.

    Loss: mean (e' - e)^2 with weight sqrt(min(SNR, 5) / SNR), t stratified over the batch; one caption in ten is empty,
    for guidance.
    """
    averager.rank = rank
    state = options.work / "unet_state.pt"
    pairs = Pairs(options, rank, state)
    captions, alphas = Captions(), alphas_cumprod().to(options.device)
    torch.manual_seed(options.seed)
    model = build_unet()
    begin_with(model, options.init)
    model = model.to(options.device, memory_format=CHANNELS_LAST).train()
    network = torch.compile(model) if options.compile else model
    torch.manual_seed(int(pairs.rng.integers(1 << 31)))
    batch = options.batch or (256 if options.on_gpu else 8)
    # On a CPU in bfloat16 the plain attention is faster backwards than the fused one.
    plain = not options.on_gpu and autoencoding.has_bfloat16()
    together = {"patches_replace": {"attn1": {(name, i): see_partner for name in BLOCKS for i in range(12)}}}
    steps = itertools.count()

    def loss() -> tuple[Tensor, dict[str, float]]:
        paired = next(steps) % 3 != 0
        clean, texts = pairs.draw(batch, paired)
        t = torch.from_numpy((pairs.stratified(batch) * 1000).astype(np.int64))
        clean, context, t = (v.to(options.device) for v in (clean, captions(texts).float(), t))
        alpha, noise = alphas[t][:, None, None, None], torch.randn_like(clean)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=CHANNELS_LAST)
        with options.autocast(), sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            predicted = network(noisy, t, context=context, transformer_options=together.copy() if paired else {})
        snr = (alpha / (1 - alpha)).flatten()
        errors = (predicted.float() - noise).square().mean((1, 2, 3))
        value = ((snr.clamp(max=5) / snr).sqrt() * errors).mean()
        return value, {"pair" if paired else "single": errors.mean().item()}

    def save(average: dict[str, Tensor]) -> None:
        save_weights(options.work / checkpoint.UNET, checkpoint.pack(average), pairs.settings)

    lr = options.lr or (6e-4 if options.on_gpu else 4e-4)
    recipe = {"lr": lr, "weight_decay": 0.01, "ema_decay": 0.9985, "warm_up": 100}
    fit(model, averager, loss, options, **recipe, state=state, save=save)


# -------------------------------------------------------------------------------------------------------------- judge


def train_the_judge(options: Options) -> None:
    """Train the judge on drawn pictures and on decoded ones; print its accuracy on held-out pictures of both kinds."""
    images, _, scenes = drawn(options, "train", TRAINING_SEED, options.images, SHARE_OF_SIGNS)
    path = _first_existing(options.work / checkpoint.AUTOENCODER, autoencoding.WEIGHTS)
    model = autoencoding.load(path, options.device)
    torch.manual_seed(options.seed)
    count = len(images) if options.on_gpu else min(len(images), 600)  # decoding is slow on a CPU
    repeat = max(1, len(images) // (4 * count))  # so that at least a fifth of what is shown was decoded
    decoded = _decoded(model, images[:count], noise=0.08)
    areas = train_judge.areas_of(scenes)
    judge = train_judge.train(
        np.concatenate([images, *[decoded] * repeat]),
        np.concatenate([areas, *[areas[:count]] * repeat]),
        scenes + scenes[:count] * repeat,
        steps=options.steps or 3000,
        batch=options.batch or (128 if options.on_gpu else 32),
        lr=options.lr or 2e-3,
        seed=options.seed,
        device=options.device,
        init=options.init,
    )
    train_judge.save(judge, options.work / "judge.safetensors")
    for kind, signs, n in (("", 0.0, 300), (" with signs", 1.0, 150)):
        held, masks, scenes = drawn(options, "validation" + kind.replace(" ", "_"), VALIDATION_SEED, n, signs)
        for name, pictures in (("drawn", held), ("decoded", _decoded(model, held))):
            right = train_judge.accuracy(judge, pictures, scenes)
            area = train_judge.overlap(judge, pictures, masks / 255)
            told = " ".join(f"{n} {v:.3f}" for n, v in right.items())
            print(f"{name}{kind}: {told} mask IoU {area:.3f}", flush=True)


def _decoded(model: autoencoding.Autoencoder, images: np.ndarray, noise: float = 0.0) -> np.ndarray:
    decoded = autoencoding.round_trip(model, torch.from_numpy(images).float() / 255, noise)
    return (decoded * 255).round().byte().numpy()


# -------------------------------------------------------------------------------------------------------- the program


def count_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def stage_autoencoder(options: Options) -> None:
    drawn(options, "train", TRAINING_SEED, options.images, SHARE_OF_SIGNS)  # before the processes start, which share it
    numbers = count_of(autoencoding.Autoencoder(options.channels))
    parallel.run(train_autoencoder, numbers, options.processes, options)
    report_autoencoder(options)


def stage_unet(options: Options) -> None:
    parallel.run(train_unet, count_of(build_unet()), options.processes, options)


def stage_transformer(options: Options) -> None:
    import_host()
    parallel.run(transformer.train, count_of(transformer.build()), options.processes, options)


STAGES = {
    "autoencoder": stage_autoencoder,
    "latents": encode_pairs,
    "unet": stage_unet,
    "judge": train_the_judge,
    "transformer": stage_transformer,
}
MINUTES = {
    "autoencoder": (40.0, 5.0), "latents": (None, None), "unet": (120.0, 8.0), "judge": (None, None),
    "transformer": (180.0, 8.0),
}  # CPU, GPU  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, required=True, help="folder for data and results")
    parser.add_argument("--init", type=Path, help="weights to continue from (.safetensors); not with `all`")
    parser.add_argument("--minutes", type=float, help="time for the stage")
    parser.add_argument("--steps", type=int, help="steps of the stage")
    parser.add_argument("--batch", type=int, help="pictures per step and process")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--images", type=int, default=6000, help="drawn for the autoencoder and the judge")
    parser.add_argument("--pairs", type=int, default=6000, help="drawn for the U-Net or the transformer")
    parser.add_argument(
        "--channels", type=int, default=autoencoding.LATENT_CHANNELS, help="of the autoencoder's latents"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, help="on a CPU; default 2")
    parser.add_argument("--resume", action="store_true", help="go on from the state that an earlier run left in DIR")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net or the transformer")
    given = vars(parser.parse_args())
    stage, processes = given.pop("stage"), given.pop("processes")
    if stage == "all" and given["init"]:
        parser.error("--init continues one stage; name it instead of `all`")
    on_gpu = given["device"] != "cpu"
    options = Options(**given, processes=1 if on_gpu else processes or 2)
    options.work.mkdir(parents=True, exist_ok=True)
    if not on_gpu:
        torch.set_num_threads(1)
    chosen = [name for name in STAGES if name != "transformer"] if stage == "all" else [stage]
    for name in chosen:
        print(f"== {name}", flush=True)
        if not (given["minutes"] or given["steps"]):
            options.minutes = MINUTES[name][on_gpu]
        STAGES[name](options)


if __name__ == "__main__":
    main()
