"""The judge: a small network that reads off a picture what a Scene says, and where the animal is.

It is trained on drawn pictures and on drawn pictures that went through the autoencoder (train_judge.py), and on nothing
a diffusion model made, so it can score such a model's pictures as an outsider.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

if __package__:
    from . import world
else:  # beside a program in this folder
    import world

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
SIZE = 128  # pictures are judged at this size
AREA_SIZE = 64
AREAS = ("animal", *world.PART_KINDS, "second")  # as world.render_parts names them
UNDEFINED = -100  # the class of an attribute that the scene does not show; cross_entropy's default ignore_index


def shows(scene: world.Scene, name: str) -> bool:
    """Whether the attribute can be seen at all: birds wear no socks, a plain coat has no second colour."""
    socks = scene.socks and scene.species != "bird"
    if name == "second":
        return scene.pattern != "plain" or socks or scene.tailtip
    return name != "socks" or scene.species != "bird"


def labels(scenes: list[world.Scene]) -> dict[str, Tensor]:
    """The class of every attribute, int64 (B,) each; UNDEFINED where a scene does not show it."""
    return {
        name: torch.tensor([values.index(getattr(s, name)) if shows(s, name) else UNDEFINED for s in scenes])
        for name, values in world.ATTRIBUTES.items()
    }


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Judge(nn.Module):
    """Pictures (B, 3, 128, 128) in 0..1 -> logits (B, classes) per attribute, and logits of the areas (B, 6, 64, 64).

    A coarse path (8 x 8) knows the layout. A fine path (32 x 32) finds the areas and is averaged over each of them, and
    over further maps it may choose itself, so that it reads the collar or the paws wherever the animal stands.
    """

    def __init__(self, maps: int = 12):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 24, 2), conv(24, 48, 2), conv(48, 64))  # 32 x 32
        self.middle = nn.Sequential(conv(64, 96, 2), conv(96, 96))  # 16 x 16
        self.coarse = nn.Sequential(conv(96, 128, 2), conv(128, 128))  # 8 x 8
        self.coarse_to_middle, self.middle_to_fine = nn.Conv2d(128, 96, 1), nn.Conv2d(96, 64, 1)
        self.fine = nn.Sequential(conv(64, 64), conv(64, 64))
        self.attention, self.areas = nn.Conv2d(64, maps, 1), nn.Conv2d(64, 4 * len(AREAS), 1)
        self.layout = nn.Sequential(nn.Conv2d(128, 32, 1), nn.Flatten(), nn.Linear(32 * 64, 192), nn.ReLU())
        pooled = (maps + len(AREAS)) * 64
        self.parts = nn.Sequential(nn.Flatten(), nn.Linear(pooled, 256), nn.ReLU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({name: nn.Linear(192 + 256, len(v)) for name, v in world.ATTRIBUTES.items()})

    def forward(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        fine = self.stem(pictures * 2 - 1)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = F.relu(middle + F.interpolate(self.coarse_to_middle(coarse), scale_factor=2))
        fine = self.fine(fine + F.interpolate(self.middle_to_fine(middle), scale_factor=2))
        areas = F.pixel_shuffle(self.areas(fine), 2)
        shares = F.avg_pool2d(areas.detach().float().sigmoid(), 2).flatten(2)  # learned from the drawn areas alone
        shares = shares / (shares.sum(2, keepdim=True) + 0.1)
        attention = torch.cat([self.attention(fine).float().flatten(2).softmax(2), shares], 1)
        parts = self.parts(attention.to(fine.dtype) @ fine.flatten(2).transpose(1, 2))
        features = torch.cat([self.layout(coarse), parts], 1)
        return {name: head(features) for name, head in self.heads.items()}, areas


def load(path: str | Path = WEIGHTS, device: str | torch.device = "cpu") -> Judge:
    """The trained judge, in float32 and evaluation mode."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=False)
    return judge.to(device).eval()


def to_pictures(images) -> Tensor:
    """Any of uint8 or float (B, H, W, 3), numpy or torch, one image or many -> float32 (B, 3, 128, 128) in 0..1."""
    images = torch.as_tensor(images)
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"judge: need images (B, H, W, 3), got {tuple(images.shape)}")
    pictures = (images.float() / 255 if images.dtype == torch.uint8 else images.float()).movedim(-1, 1)
    if pictures.shape[-2:] != (SIZE, SIZE):
        pictures = F.interpolate(pictures, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return pictures.clamp(0, 1)


@torch.no_grad()
def ask(judge: Judge, images, batch: int = 32) -> dict[str, Tensor]:
    """Logits (B, classes) of every attribute and "mask", the animal's, in 0..1, (B, 64, 64); float32 on the CPU."""
    device = next(judge.parameters()).device
    answers = [judge(part.to(device)) for part in to_pictures(images).split(batch)]
    joined = {name: torch.cat([answer[name].float().cpu() for answer, _ in answers]) for name in world.ATTRIBUTES}
    return joined | {"mask": torch.cat([areas[:, 0].float().cpu().sigmoid() for _, areas in answers])}
