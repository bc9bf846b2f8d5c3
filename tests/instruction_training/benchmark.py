"""Train the pocket's instruction model on triples of the drawn world, for hours, and measure it.

    python dev.py bench instruction_training --work DIR --minutes 120        encode, train, measure
    python dev.py bench instruction_training --work DIR --stage unet --minutes 120 --resume
    python dev.py bench instruction_training --work DIR --stage edits --count 32

The U-Net is the pocket's, of half the width, with 4 blank channels more for the source, all of it trained. It reads the
instruction itself in half of the steps and the result in words (the caption of the ideal edit) in the others, so that
both can be compared in one network; 5 % each without text, without picture, without both. Two single-threaded processes
average their gradients. DIR has the latents in parts, the state to go on from, and the weights in 8 bits.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import numpy as np
import torch
from instruction_training import pocket_triples
from pocket import autoencoder, checkpoint, metrics, parallel, train, world
from pocket import judge as judging
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

UNET, STATE = "unet_edit.safetensors", "unet_edit_state.pt"
CHECKPOINT = "palimpsest_pocket_edit.safetensors"
BANDS = (0.05, 0.05, 0.05)
FIRST = "input_blocks.0.0.weight"
LEVELS = (300, 600, 850)
TEXT_GUIDANCE, PICTURE_GUIDANCE, STEPS = 5.0, 1.5, 10


def maths():
    """The kernels of the pack, also in a process that was started for the training."""
    import prepared

    prepared.load_pack()
    from palimpsest.kernels import instruction_training

    return instruction_training


# ----------------------------------------------------------------------------------------------------------- training


def build(state: dict[str, Tensor]) -> nn.Module:
    """The narrow U-Net with 8 inputs; weights of 4 are widened by zeros."""
    weight = state[FIRST].float()
    if weight.shape[1] == 4:
        weight = maths().with_picture_channels(weight, 4)
    model = train.build_unet()
    import comfy.ops

    model.input_blocks[0][0] = comfy.ops.disable_weight_init.Conv2d(8, len(weight), 3, padding=1)
    model.in_channels = 8
    model.load_state_dict({name: value.float() for name, value in state.items()} | {FIRST: weight})
    return model


def settings_of(init: Path | None) -> tuple[dict[str, Tensor], float, float]:
    """(weights to start from, mean, std of the latents that they know)."""
    state, told = checkpoint.load_weights(init or checkpoint.WEIGHTS / checkpoint.UNET)
    return state, float(told["latent_mean"]), float(told["latent_std"])


def units(latents: Tensor, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """(sources as the host gives them to such a model, results as the U-Net draws them), of (n, 2, 4, 16, 16)."""
    normal = (latents.float() - mean) / std
    return normal[:, 0] / checkpoint.SD15_LATENT_SCALE, normal[:, 1]


def train_unet(averager: parallel.Averager, rank: int, options: train.Options) -> None:
    """Predict the noise in results, beside the source and a text; loss and schedule as in pocket.train.train_unet."""
    averager.rank = rank
    state = options.work / STATE
    started = [state.stat().st_mtime_ns] if options.resume and state.exists() else []  # other draws than before
    rng = np.random.default_rng([options.seed, rank, *started])
    given, mean, std = settings_of(options.init)
    sources, results = units(torch.from_numpy(np.load(options.work / "triples.npy")), mean, std)
    triples = [pocket_triples.triple(index) for index in range(len(results))]
    captions, alphas, bands = train.Captions(), train.alphas_cumprod(), maths().dropout_bands
    model = build(given).to(memory_format=train.CHANNELS_LAST).train()
    torch.manual_seed(int(rng.integers(1 << 31)))
    batch = options.batch or 8
    plain = autoencoder.has_bfloat16()  # then the plain attention is faster backwards than the fused one

    def loss() -> tuple[Tensor, dict[str, float]]:
        index = rng.integers(0, len(results), batch)
        told, seen = bands(torch.from_numpy(rng.random(batch)), *BANDS)
        texts = [triples[i].expressed if rng.random() < 0.5 else triples[i].instruction for i in index]
        context = captions([text if keep else "" for text, keep in zip(texts, told.tolist(), strict=True)]).float()
        picture, clean = sources[index] * seen[:, None, None, None], results[index]
        t = torch.from_numpy(((rng.permutation(batch) + rng.random(batch)) / batch * 1000).astype(np.int64))
        alpha, noise = alphas[t][:, None, None, None], torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        given = torch.cat([noisy, picture], 1).contiguous(memory_format=train.CHANNELS_LAST)
        with options.autocast(), sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            predicted = model(given, t, context=context)
        snr = (alpha / (1 - alpha)).flatten()
        errors = (predicted.float() - noise).square().mean((1, 2, 3))
        return ((snr.clamp(max=5) / snr).sqrt() * errors).mean(), {"mse": errors.mean().item()}

    told = {"latent_mean": str(mean), "latent_std": str(std)}

    def save(average: dict[str, Tensor]) -> None:
        train.save_weights(options.work / UNET, checkpoint.pack(average), told)

    recipe = {"lr": options.lr or 3e-4, "weight_decay": 0.01, "ema_decay": 0.9985, "warm_up": 100}
    train.fit(model, averager, loss, options, **recipe, state=state, save=save)


def stage_latents(options: train.Options, count: int) -> None:
    """Draw and encode the triples."""
    np.save(options.work / "triples.npy", pocket_triples.encode(options.work, options.pairs, options.processes))


def stage_unet(options: train.Options, count: int) -> None:
    """Train, in processes."""
    state, *_ = settings_of(options.init)
    numbers = train.count_of(build(state))
    parallel.run(train_unet, numbers, options.processes, options)


# -------------------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
def stage_noise(options: train.Options, count: int) -> None:
    """Noise MSE on held-out triples: whether the source is read, and which text helps."""
    state, mean, std = settings_of(options.work / UNET)
    model, alphas, captions = build(state).eval(), train.alphas_cumprod(), train.Captions()
    triples = pocket_triples.held_out(count)
    sources, results = units(pocket_triples.encoded(triples), mean, std)
    noise = torch.randn(results.shape, generator=torch.Generator().manual_seed(1))
    texts = {"expressed": [t.expressed for t in triples], "instruction": [t.instruction for t in triples]}
    pictures = {"source": sources, "none": torch.zeros_like(sources), "another": sources.roll(1, 0)}
    print("| t | text | " + " | ".join(pictures) + " |\n|---|---|" + "---|" * len(pictures))
    for t in LEVELS:
        alpha = alphas[t]
        noisy = alpha.sqrt() * results + (1 - alpha).sqrt() * noise
        for name, said in texts.items():
            errors = []
            for picture in pictures.values():
                predicted = model(
                    torch.cat([noisy, picture], 1), torch.full((count,), t), context=captions(said).float()
                )
                errors.append((predicted - noise).square().mean().item())
            print(f"| {t} | {name} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")


def build_checkpoint(work: Path) -> Path:
    """The whole model for the host's loader, in the work folder."""
    unet, mean, std = settings_of(work / UNET)
    parts, _ = checkpoint.load_weights(checkpoint.WEIGHTS / checkpoint.AUTOENCODER)
    train.save_weights(work / CHECKPOINT, checkpoint.assemble(unet, parts, latent_mean=mean, latent_std=std))
    return work / CHECKPOINT


def edited(model, clip, vae, pictures: Tensor, texts: list[str]) -> Tensor:
    """Pictures changed as the texts say, by the host's own nodes and both guidances."""
    import comfy.samplers
    import tiny_models
    from comfy_extras.nodes_custom_sampler import DualCFGGuider
    from comfy_extras.nodes_ip2p import InstructPixToPixConditioning

    found = []
    for number, text in enumerate(texts):
        said, none = (clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in (text, ""))
        seen = {"positive": said, "negative": none, "vae": vae, "pixels": pictures[number : number + 1]}
        first, second, latent = tiny_models.execute(InstructPixToPixConditioning, **seen)
        (guider,) = tiny_models.execute(
            DualCFGGuider, model=model, cond1=first, cond2=second, negative=none, cfg_conds=TEXT_GUIDANCE,
            cfg_cond2_negative=PICTURE_GUIDANCE, style="regular",
        )  # fmt: skip
        empty = latent["samples"]
        noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(number))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", STEPS)
        solver = comfy.samplers.sampler_object("euler")
        found.append(vae.decode(guider.sample(noise, empty, solver, sigmas, disable_pbar=True, seed=0)).clamp(0, 1))
    return torch.cat(found)


def stage_edits(options: train.Options, count: int) -> None:
    """Held-out edits in the host, plain and vague instructions apart: table and a sheet."""
    import comfy.sd
    from PIL import Image

    file, triples, judge = build_checkpoint(options.work), pocket_triples.held_out(count), judging.load()
    with torch.inference_mode():
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(file))
        source = metrics.to_float(np.stack([world.render(each.source) for each in triples]))
        ideal = metrics.to_float(np.stack([world.render(each.edited) for each in triples]))
        drawn = {
            "source as it is": source,
            "instruction": edited(model, clip, vae, source, [each.instruction for each in triples]),
            "expressed": edited(model, clip, vae, source, [each.expressed for each in triples]),
        }
    print("| instructions | text | attributes right | identity | PSNR to the ideal |\n|---|---|---|---|---|")
    for kind, vague in (("plain", False), ("vague", True)):
        rows = [number for number, each in enumerate(triples) if each.vague == vague]
        for name, pictures in drawn.items():
            print(f"| {kind} | {name} | {measured(judge, pictures[rows], ideal[rows], [triples[r] for r in rows])} |")
    tiles = [np.concatenate(list((p[:8] * 255).byte().numpy()), 1) for p in (source, ideal, *list(drawn.values())[1:])]
    Image.fromarray(np.concatenate(tiles, 0)).save(options.work / "edits.png")


def measured(judge: judging.Judge, pictures: Tensor, ideal: Tensor, triples: list[pocket_triples.Triple]) -> str:
    """The cells of a row."""
    scenes = [each.edited for each in triples]
    right = metrics.attribute_success(judge, pictures, scenes)["all"]
    alike = metrics.identity(judge, pictures, scenes)["score"].mean().item()
    near = metrics.psnr(pictures, ideal).mean().item()
    return f"{right:.2f} | {alike:.2f} | {near:.1f}"


STAGES = {"latents": stage_latents, "unet": stage_unet, "noise": stage_noise, "edits": stage_edits}


def main() -> None:
    """Run a stage, or all."""
    parser = argparse.ArgumentParser(prog="python dev.py bench instruction_training", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and results")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--triples", type=int, default=12000, help="drawn for the training")
    parser.add_argument("--init", type=Path, help="weights to start from; default the shipped U-Net")
    parser.add_argument("--minutes", type=float, help="of training; default 120")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="triples a step and process")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--count", type=int, default=32, help="held-out triples")
    parser.add_argument("--resume", action="store_true", help="go on from the state that is in the work folder")
    given = vars(parser.parse_args())
    stage, count, pairs = given.pop("stage"), given.pop("count"), given.pop("triples")
    if not (given["minutes"] or given["steps"]):
        given["minutes"] = 120.0
    options = train.Options(**given, pairs=pairs, device="cpu")
    options.work.mkdir(parents=True, exist_ok=True)
    for name in STAGES if stage == "all" else [stage]:
        print(f"== {name}", flush=True)
        STAGES[name](options, count)
