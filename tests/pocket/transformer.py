"""The pocket transformer: FLUX.1's layout without pooled vector, trained on the drawn world as a flow.

It reads latents of 16 channels (`train.py autoencoder --channels 16`) and the pocket's own text encoder, so its file
goes through the host's Load Diffusion Model, Load CLIP and Load VAE.
"""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if __package__:
    from . import autoencoder as autoencoding
    from . import checkpoint, parallel, text_encoder
    from .fitting import Captions, Options, Pairs, begin_with, fit, import_host, save_weights
else:  # run as a program: its own folder is on the path
    import autoencoder as autoencoding
    import checkpoint
    import parallel
    import text_encoder
    from fitting import Captions, Options, Pairs, begin_with, fit, import_host, save_weights

CHANNELS, PATCH, WIDTH, HEADS = 16, 2, 256, 2
DOUBLE, SINGLE = 2, 4  # blocks
WEIGHTS = "transformer.safetensors"
KEPT_INPUTS = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm")


def build() -> nn.Module:
    """The host's Flux with fresh weights: gates and the last layer start at 0, so that every block is the identity."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(
        image_model="flux",
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        vec_in_dim=None,
        context_in_dim=text_encoder.WIDTH,
        hidden_size=WIDTH,
        mlp_ratio=4.0,
        num_heads=HEADS,
        depth=DOUBLE,
        depth_single_blocks=SINGLE,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=PATCH,
        qkv_bias=True,
        guidance_embed=False,
        txt_ids_dims=[],
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    for name, module in model.named_modules():  # the host's layers come without initial weights
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "weight") and "norm" in name and isinstance(module.weight, nn.Parameter):
            nn.init.ones_(module.weight)
        if name.endswith((".lin", "adaLN_modulation.1")) or name == "final_layer.linear":
            nn.init.zeros_(module.weight)
    return model


def keep_inputs(model: nn.Module) -> None:
    """Give the norms copies of their inputs: the host's blocks add to these in place, which a gradient forbids."""
    for name, module in model.named_modules():
        if name.split(".")[-1] in KEPT_INPUTS:
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))


def see_partner(attention, query: Tensor, key: Tensor, value: Tensor, *rest, **options) -> Tensor:
    """Joint attention of rows 2i and 2i + 1 to both their image tokens; (B, heads, text + image, C)."""

    def both(tensor: Tensor) -> Tensor:
        image = tensor[:, :, text_encoder.LENGTH :]
        return torch.cat([tensor, image.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)], 2)

    return attention(query, both(key), both(value), *rest, **options)


def levels(shares: np.ndarray) -> Tensor:
    """Times t in 0..1, logit-normal as FLUX.1's and SD3's training has them, by their shares in 0..1; (B,)."""
    return torch.special.ndtri(torch.from_numpy(shares).clamp(1e-4, 1 - 1e-4)).sigmoid().float()


def train(averager: parallel.Averager, rank: int, options: Options) -> None:
    """Predict eps - x0 at x_t = (1 - t) x0 + t eps, two steps of three in pairs of poses that see each other.

    The pairs are those of the U-Net's training (train.train_unet): partners have times of their own, so joint attention
    learns to look an animal up elsewhere. One caption in ten is empty, for guidance.
    """
    averager.rank = rank
    import_host()
    import comfy.model_management

    comfy.model_management.in_training = True  # rotary places by plain operations, which have a gradient
    state = options.work / "transformer_state.pt"
    pairs = Pairs(options, rank, state)
    captions = Captions()
    torch.manual_seed(options.seed)
    model = build()
    begin_with(model, options.init)
    keep_inputs(model.to(options.device).train())
    network = torch.compile(model) if options.compile else model
    torch.manual_seed(int(pairs.rng.integers(1 << 31)))
    batch = options.batch or (256 if options.on_gpu else 8)
    plain = not options.on_gpu and autoencoding.has_bfloat16()  # faster backwards there than the fused attention
    steps = itertools.count()

    def loss() -> tuple[Tensor, dict[str, float]]:
        paired = next(steps) % 3 != 0
        clean, texts = pairs.draw(batch, paired)
        t = levels(pairs.stratified(batch))
        clean, context, t = (v.to(options.device) for v in (clean, captions(texts).float(), t))
        noise, level = torch.randn_like(clean), t[:, None, None, None]
        noisy = (1 - level) * clean + level * noise
        together = {"optimized_attention_override": see_partner} if paired else {}
        with options.autocast(), sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            predicted = network(noisy, t, context, transformer_options=together)
        value = (predicted.float() - (noise - clean)).square().mean()
        return value, {"pair" if paired else "single": value.item()}

    def save(average: dict[str, Tensor]) -> None:
        save_weights(options.work / WEIGHTS, checkpoint.pack(average), pairs.settings)

    lr = options.lr or (6e-4 if options.on_gpu else 5e-4)
    recipe = {"lr": lr, "weight_decay": 0.01, "ema_decay": 0.9985, "warm_up": 300}
    fit(model, averager, loss, options, **recipe, state=state, save=save)
