"""Numbers that say how good an edit is. Images are float or uint8 (B, H, W, 3) or (H, W, 3), as the host holds them.

A diffusion model rarely draws the edited animal on the very pixels of the ideal picture, so errors per pixel say
little about the animal. `identity` forgives a displacement: it asks the judge for what a caption never tells (coat,
collar, ...) and compares the colours inside the animals' masks as distributions. README.md shows how well it separates.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if __package__:
    from . import judge as judging
    from . import world
else:  # beside a program in this folder
    import judge as judging
    import world

IDENTITY = ("facing", "pattern", "second", "collar", "socks", "tailtip")
PALETTE_FLOOR = 3.0  # Lab units that the autoencoder alone costs
PALETTE_SCALE = 4.0  # Lab units beyond the floor at which the palette's score has fallen to 1 / e
QUANTILES = 64


def to_float(images) -> Tensor:
    """float32 (B, H, W, 3) in 0..1."""
    images = torch.as_tensor(images)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"metrics: need images (B, H, W, 3), got {tuple(images.shape)}")
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def to_mask(mask, like: Tensor) -> Tensor:
    """float32 (B, H, W) in 0..1 of the images' size."""
    mask = torch.as_tensor(np.asarray(mask) if isinstance(mask, np.ndarray) else mask).float()
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.shape[-2:] != like.shape[1:3]:
        mask = F.interpolate(mask[:, None], size=like.shape[1:3], mode="bilinear", antialias=True)[:, 0]
    return mask.expand(len(like), -1, -1)


# ------------------------------------------------------------------------------------------------- pixel by pixel


def psnr(a, b, mask=None) -> Tensor:
    """-10 log10 mean (a - b)^2 over all pixels or those of the mask, in dB, (B,); infinite for equal images."""
    a, b = to_float(a), to_float(b)
    squares = (a - b).square().mean(-1)
    weight = torch.ones_like(squares) if mask is None else to_mask(mask, squares[..., None])
    return -10 * torch.log10((squares * weight).sum((1, 2)) / weight.sum((1, 2)))


def ssim(a, b, mask=None) -> Tensor:
    """Structural similarity with an 11 x 11 Gaussian window of sigma 1.5, mean over channels and pixels, (B,).

    Wang et al. 2004, eq. 13, C1 = 0.01^2, C2 = 0.03^2 for images in 0..1; only windows that lie within the image.
    """
    a, b = to_float(a).movedim(-1, 1), to_float(b).movedim(-1, 1)
    axis = torch.arange(11.0) - 5
    line = torch.exp(-(axis**2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    score = score.mean(1)
    weight = torch.ones_like(score)
    if mask is not None:
        weight = to_mask(mask, a.movedim(1, -1))[:, 5:-5, 5:-5]
    return (score * weight).sum((1, 2)) / weight.sum((1, 2))


# ---------------------------------------------------------------------------------------------------- attributes


def attributes(judge: judging.Judge, images) -> dict[str, list]:
    """What the judge reads off each image: attribute -> one value of world.ATTRIBUTES per image."""
    answers = judging.ask(judge, images)
    return {name: [values[i] for i in answers[name].argmax(1).tolist()] for name, values in world.ATTRIBUTES.items()}


def attribute_success(
    judge: judging.Judge, images, scenes: list[world.Scene], names: Iterable[str] = tuple(world.CAPTIONED)
) -> dict[str, float]:
    """Share of images whose attribute is the scene's, over scenes that show it; "all" is the share right in all."""
    right = right_answers(judging.ask(judge, images), scenes, names)
    every = torch.stack([value.nan_to_num(nan=1.0) for value in right.values()]).amin(0)
    return {name: value.nanmean().item() for name, value in right.items()} | {"all": every.mean().item()}


def right_answers(answers: dict[str, Tensor], scenes: list[world.Scene], names: Iterable[str]) -> dict[str, Tensor]:
    """1 where the judge's answer is the scene's, 0 where not, nan where the scene does not show it; (B,) each."""
    truth = judging.labels(scenes)
    right = {name: (answers[name].argmax(1) == truth[name]).float() for name in names}
    return {name: value.masked_fill(truth[name] < 0, torch.nan) for name, value in right.items()}


# ------------------------------------------------------------------------------------------------------ identity


def identity(judge: judging.Judge, images, scenes: list[world.Scene]) -> dict[str, Tensor]:
    """How far each image shows the animal of its scene (the ideal edit's scene), wherever it stands; (B,) each.

    score    geometric mean of `hidden` and `palette`, 0..1
    hidden   mean over the shown attributes that captions never tell of the judge's probability of the right value
    palette  exp(-(palette_distance - 3) / 4), at most 1
    and one entry per attribute of IDENTITY: 1 right, 0 wrong, nan not shown.
    """
    images = to_float(images)
    ideal, masks = zip(*(world.render(scene, images.shape[1], with_mask=True) for scene in scenes), strict=True)
    answers = judging.ask(judge, images)
    truth = judging.labels(scenes)
    chances = [
        answers[name]
        .softmax(1)
        .gather(1, truth[name].clamp(min=0)[:, None])[:, 0]
        .masked_fill(truth[name] < 0, torch.nan)
        for name in IDENTITY
    ]
    hidden = torch.stack(chances).nanmean(0)
    distance = palette_distance(images, np.stack(ideal), answers["mask"], np.stack(masks))
    palette = torch.exp(-(distance - PALETTE_FLOOR).clamp(min=0) / PALETTE_SCALE)
    return {"score": (hidden * palette).sqrt(), "hidden": hidden, "palette": palette} | right_answers(
        answers, scenes, IDENTITY
    )


def palette_distance(image, ideal, mask_of_image, mask_of_ideal) -> Tensor:
    """Distance (B,) of the colours inside two masks, in Lab units: sliced Wasserstein-1 over fixed directions.

    W1 along a direction is the mean absolute difference of the two distributions' quantiles. Where a colour is does not
    count. Masks (B, h, w) of any size; an empty mask is as far as black is from white.
    """
    distances = []
    image, ideal = to_float(image), to_float(ideal)
    masks = to_mask(mask_of_image, image), to_mask(mask_of_ideal, ideal)
    for a, b, mask_a, mask_b in zip(lab(image), lab(ideal), *masks, strict=True):
        pixels_a, pixels_b = a[mask_a > 0.5], b[mask_b > 0.5]
        if not (len(pixels_a) and len(pixels_b)):
            distances.append(torch.tensor(100.0))
            continue
        distances.append((_quantiles(pixels_a) - _quantiles(pixels_b)).abs().mean())
    return torch.stack(distances)


def _quantiles(pixels: Tensor) -> Tensor:
    """Pixels (N, 3) -> quantiles (QUANTILES, directions) along lightness, the two colour axes and their diagonals."""
    directions = torch.tensor(
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [0, 1, -1], [1, 1, 0], [1, -1, 0], [1, 0, 1], [1, 0, -1]]
    ).float()
    directions = directions / directions.norm(dim=1, keepdim=True)
    levels = (torch.arange(QUANTILES) + 0.5) / QUANTILES
    return torch.quantile(pixels @ directions.T, levels, dim=0)


def lab(images: Tensor) -> Tensor:
    """sRGB in 0..1 (..., 3) -> CIE L*a*b* under D65."""
    linear = torch.where(images <= 0.04045, images / 12.92, ((images.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    xyz = linear @ to_xyz.T / torch.tensor([0.95047, 1.0, 1.08883])
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-8) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
