"""The pocket model's autoencoder: TAESD's layers under the host's names, for decoding pictures without the host.

Pictures (B, 3, H, W) in 0..1 <-> latents (B, 4, H / 8, W / 8), before the checkpoint's vae_scale and vae_shift.
Layout: https://github.com/madebyollin/taesd (MIT), the version without normalisation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "autoencoder.safetensors"
WIDTH, LATENT_CHANNELS = 64, 4
BLOCKS_A_LEVEL = 3


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Clamp(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return torch.tanh(latent / 3) * 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + x)


class Autoencoder(nn.Module):
    def __init__(self, channels: int = LATENT_CHANNELS):
        super().__init__()
        self.channels = channels
        down = [
            layer for _ in range(3) for layer in (conv(WIDTH, WIDTH, stride=2, bias=False), *blocks(BLOCKS_A_LEVEL))
        ]
        up = [
            layer
            for _ in range(3)
            for layer in (*blocks(BLOCKS_A_LEVEL), nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False))
        ]
        self.taesd_encoder = nn.Sequential(conv(3, WIDTH), Block(), *down, conv(WIDTH, channels))
        self.taesd_decoder = nn.Sequential(Clamp(), conv(channels, WIDTH), nn.ReLU(), *up, Block(), conv(WIDTH, 3))

    def encode(self, pictures: Tensor) -> Tensor:
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder(latents)

    def initialise(self, seed: int) -> None:
        """Kaiming weights; each block's last convolution starts at 0.3 of that, so that blocks start near identity."""
        torch.manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)
            if name.endswith("conv.4.weight"):
                parameter.data.mul_(0.3)

    def with_channels(self, channels: int, seed: int = 0) -> Autoencoder:
        """A new one with more latent channels: the first are these, the others as `initialise` leaves them."""
        wider, own = Autoencoder(channels), self.state_dict()
        wider.initialise(seed)
        for name, fresh in wider.state_dict().items():
            fresh[tuple(slice(size) for size in own[name].shape)] = own[name]
        return wider

    def hold_fine_encoder(self) -> None:
        """Train no layer of the encoder that works at whole or half resolution: seven eighths of its operations."""
        for layer in self.taesd_encoder[: 2 + 1 + BLOCKS_A_LEVEL]:
            layer.requires_grad_(False)


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 itself; where it is emulated, it is ten times slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: str | torch.device):
    """bfloat16 where the device has it, else float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind != "cpu" or has_bfloat16())


def blocks(n: int) -> list[Block]:
    return [Block() for _ in range(n)]


def load(path: str | Path = WEIGHTS, device: str | torch.device = "cpu") -> Autoencoder:
    """The trained autoencoder in float32, from a .safetensors under the host's names (further tensors are ignored)."""
    state = {name: value.float() for name, value in load_file(path).items() if name.startswith("taesd_")}
    model = Autoencoder(channels=state["taesd_decoder.1.weight"].shape[1])
    model.load_state_dict(state)
    return model.to(device, memory_format=torch.channels_last).eval()


@torch.no_grad()
def round_trip(model: Autoencoder, images: Tensor, noise: float = 0.0, batch: int = 8) -> Tensor:
    """Images (B, H, W, 3) in 0..1 through encoder and decoder; `noise` is the spread of noise added to the latents."""
    device, out = next(model.parameters()).device, []
    for part in images.movedim(-1, 1).split(batch):
        part = part.to(device).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            latents = model.encode(part).float()
            pictures = model.decode(latents + noise * torch.randn_like(latents))
        out.append(pictures.float().clamp(0, 1).movedim(1, -1).cpu())
    return torch.cat(out)
