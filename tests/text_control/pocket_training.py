"""Train the pocket's text control for some hours: network and projection together, the U-Net frozen, as AnyText does.

The network begins as the first half of the U-Net, its zero convolutions at zero. Unlike the node, which runs the host's
whole model in float32, this runs the narrow U-Net and the one layer of the text encoder that does anything, in bfloat16
where the CPU has it; a thousandth of the published training's pictures have to do. So the layers that read glyphs do
not begin as small as torch's own, through nine of which letters fade, and the cells of a line's place count more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pocket import autoencoder, checkpoint, parallel, text_encoder, train, world
from text_control import pocket_control, pocket_signs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FILE, STATE = "text_control.safetensors", "text_control_state.pt"
PLACE_WEIGHT = 5.0  # of a cell in a line's place, beside 1
BLANK_SHARE, UNTOLD = 0.5, 0.1  # shown no picture, as AnyText's; told no text, for guidance
NEW_PICTURES = 100  # steps after which a training looks for further parts


class Encoder(text_encoder.Encoder):
    """The pocket's text encoder with embeddings in the place of ` * `, and a gradient into them."""

    def __init__(self) -> None:
        super().__init__()
        (self.star,) = self.tokenizer("*")["input_ids"][1:-1]

    def embed(self, texts: Sequence[str], embeddings: Tensor) -> Tensor:
        """Texts with one ` * ` or none, embeddings (B, 768) -> (B, 77, 768)."""
        ids = torch.tensor([self.token_ids(text) for text in texts])
        place = (ids == self.star)[..., None]
        x = torch.where(place, embeddings[:, None], self.tokens[ids].float()) + self.positions
        normed = F.layer_norm(x, (text_encoder.WIDTH,))
        heads = (text_encoder.HEADS, text_encoder.WIDTH // text_encoder.HEADS)
        q, k, v = ((normed @ weight.T).unflatten(-1, heads).transpose(1, 2) for weight in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.layer_norm(x + (mixed @ self.out.T).float(), (text_encoder.WIDTH,))


class Learning(nn.Module):
    """What is trained: the control, and the projection by its names."""

    def __init__(self, unet: dict[str, Tensor], star: int, seed: int):
        super().__init__()
        self.control = begun(unet, seed)
        first = pocket_control.first_projection(star, seed)
        self.projection = nn.ParameterDict({name: nn.Parameter(value) for name, value in first.items()})

    def embeddings(self, necks: Tensor) -> Tensor:
        """(B, 768) of lines (B, 40, 64)."""
        from palimpsest.kernels.exact_text import token_embedding

        return token_embedding(necks, **self.projection)


def begun(unet: dict[str, Tensor], seed: int) -> nn.Module:
    """The control as the first half of a U-Net: zero convolutions at zero, the hint block drawn."""
    from palimpsest.nodes.text_control.trained import first_weights

    torch.manual_seed(seed)
    network = pocket_control.build()
    weights = {name: value.float() for name, value in unet.items()} | first_weights(network, seed)
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    for name, weight in network.input_hint_block.named_parameters():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
            weight.data *= 0.3 if name.startswith("fuse_block") else 1.15  # SiLU passes on less than ReLU
    return network


def frozen(unet: dict[str, Tensor]) -> nn.Module:
    """The narrow U-Net, which does not learn."""
    model = train.build_unet()
    model.load_state_dict({name: value.float() for name, value in unet.items()})
    return model.to(memory_format=train.CHANNELS_LAST).requires_grad_(False).eval()


def prompts_of(scenes: Sequence[world.Scene], rng: np.random.Generator) -> list[str]:
    """What trainings of the pocket tell of scenes, a placeholder for the line; now and then nothing."""
    from palimpsest.nodes.exact_text import spoken

    phrases = [world.training_caption(replace(scene, sign=None), rng) for scene in scenes]
    told = [
        spoken(pocket_signs.caption_with(phrase, scene.sign.text), [scene.sign.text])[0]
        for phrase, scene in zip(phrases, scenes, strict=True)
    ]
    return ["" if rng.random() < UNTOLD else text for text in told]


def predict(unet: nn.Module, control: nn.Module, noisy: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
    """The noise that the U-Net sees beside the control."""
    from palimpsest.nodes.text_control.trained import cloned

    said = control(x=noisy, hint=hint, timesteps=t, context=context)
    options = {"patches": {"input_block_patch_after_skip": [cloned]}}
    return unet(noisy, t, context=context, control=said, transformer_options=options)


def train_control(averager: parallel.Averager, rank: int, options: train.Options) -> None:
    """Predict the noise in boards; the loss of pocket.train.train_unet, cells of a line's place counting more."""
    averager.rank = rank
    pocket_signs.pack()
    from palimpsest.nodes.text_control.applying import CELL

    state, folder = options.work / STATE, options.work / "signs"
    started = [state.stat().st_mtime_ns] if options.resume and state.exists() else []  # other draws than before
    rng = np.random.default_rng([options.seed, rank, *started])
    unet, told = checkpoint.load_weights(options.init or checkpoint.WEIGHTS / checkpoint.UNET)
    mean, std = float(told["latent_mean"]), float(told["latent_std"])
    encoder, alphas, network = Encoder(), train.alphas_cumprod(), frozen(unet)
    learning = Learning(unet, encoder.star, options.seed).to(memory_format=train.CHANNELS_LAST).train()
    torch.manual_seed(int(rng.integers(1 << 31)))
    batch, seen = options.batch or 8, {"step": 0, "signs": pocket_signs.load(folder, mean, std)}
    plain = autoencoder.has_bfloat16()  # then the plain attention is faster backwards than the fused one

    def loss() -> tuple[Tensor, dict[str, float]]:
        seen["step"] += 1
        if seen["step"] % NEW_PICTURES == 0:
            seen["signs"] = pocket_signs.load(folder, mean, std)
        known: pocket_signs.Signs = seen["signs"]
        index = rng.integers(0, len(known.scenes), batch)
        blank = torch.from_numpy(rng.random(batch) < BLANK_SHARE)[:, None, None, None]
        maps = known.maps_of(index)
        hint = torch.cat([maps, torch.where(blank, known.grey, known.masked[index])], 1)
        clean = known.latents[index]
        t = torch.from_numpy(((rng.permutation(batch) + rng.random(batch)) / batch * 1000).astype(np.int64))
        alpha, noise = alphas[t][:, None, None, None], torch.randn_like(clean)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=train.CHANNELS_LAST)
        with options.autocast(), sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            embeddings = learning.embeddings(known.necks[index]).float()
            context = encoder.embed(prompts_of([known.scenes[i] for i in index], rng), embeddings)
            predicted = predict(network, learning.control, noisy, t, context, hint)
        place = maps[:, -(CELL**2) :].mean(1, keepdim=True)
        error, snr = (predicted.float() - noise).square(), (alpha / (1 - alpha)).flatten()
        weight = 1 + (PLACE_WEIGHT - 1) * place
        errors = (weight * error).mean((1, 2, 3)) / weight.mean((1, 2, 3))
        inside = (place * error).sum() / (place.sum() * error.shape[1])
        return ((snr.clamp(max=5) / snr).sqrt() * errors).mean(), {
            "mse": error.detach().mean().item(),
            "in the place": inside.item(),
        }

    def save(average: dict[str, Tensor]) -> None:
        parts = [
            {name.removeprefix(part): value for name, value in average.items() if name.startswith(part)}
            for part in ("control.", "projection.")
        ]
        pocket_control.save(options.work / FILE, *parts, {"latent_mean": str(mean), "latent_std": str(std)})

    recipe = {"lr": options.lr or 3e-4, "weight_decay": 0.01, "ema_decay": 0.998, "warm_up": 100}
    train.fit(learning, averager, loss, options, **recipe, state=state, save=save)


def count(work: Path) -> int:
    """Numbers that are trained."""
    unet, _ = checkpoint.load_weights(checkpoint.WEIGHTS / checkpoint.UNET)
    return train.count_of(Learning(unet, 265, 0))
