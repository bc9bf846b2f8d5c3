"""Numbers that say how much an edit kept, and how well it follows its text. Pictures are (B, H, W, 3) in 0..1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SPREAD = 11, 1.5


def mse(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference (B,) in float64; weight (B, H, W): over these pixels, each as much as its weight.

    nan where no pixel has weight.
    """
    squares = (a.double() - b.double()).square().mean(-1)
    weight = torch.ones_like(squares) if weight is None else weight.double()
    return (squares * weight).sum((1, 2)) / weight.sum((1, 2))


def psnr(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio -10 log10 MSE in dB (B,), of pictures in 0..1; infinite where they are equal."""
    return -10 * torch.log10(mse(a, b, weight))


def gaussian_window(size: int = SSIM_WINDOW, spread: float = SSIM_SPREAD) -> Tensor:
    """A Gaussian over size x size pixels that sums to 1."""
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(axis**2) / (2 * spread**2))
    return line[:, None] * line / line.sum() ** 2


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of every window that lies within the picture, (B, H - 10, W - 10), mean over colours.

    ((2 mu_a mu_b + C1)(2 cov + C2)) / ((mu_a^2 + mu_b^2 + C1)(var_a + var_b + C2)), C1 = 0.01^2, C2 = 0.03^2, with a
    Gaussian window of 11 x 11 pixels and spread 1.5: Wang et al. 2004, eq. 13. Raises ValueError for smaller pictures.
    """
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"ssim needs pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {a.shape[2]} x {a.shape[1]}"
        )
    x, y = (t.double().movedim(-1, 1) for t in (a, b))
    window = gaussian_window().to(x).expand(x.shape[1], 1, -1, -1)

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(t, window, groups=t.shape[1])

    mu_a, mu_b = mean(x), mean(y)
    var_a, var_b, cov = mean(x * x) - mu_a**2, mean(y * y) - mu_b**2, mean(x * y) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return score.mean(1)


def ssim(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean structural similarity (B,); weight (B, H, W): over the windows around these pixels, nan without any."""
    score = ssim_map(a, b)
    edge = SSIM_WINDOW // 2
    weight = torch.ones_like(score) if weight is None else weight.double()[:, edge:-edge, edge:-edge]
    return (score * weight).sum((1, 2)) / weight.sum((1, 2))


def structure_distance(a: Tensor, b: Tensor) -> Tensor:
    """How differently two pictures' places resemble each other, (B,): the mean squared difference of self-similarities.

    a, b (B, N, C): one feature of each of N patches. S_ij = cos(f_i, f_j); D = mean_ij (S^a_ij - S^b_ij)^2.
    Tumanyan et al., Splicing ViT Features, arXiv:2201.00424, eq. 1 and 2, whose features are keys of DINO ViT-B/8;
    it does not see colours and textures that leave the layout alone.
    """
    return (self_similarity(a) - self_similarity(b)).square().mean((1, 2))


def self_similarity(features: Tensor) -> Tensor:
    """Cosines (B, N, N) between all patches' features (B, N, C)."""
    unit = F.normalize(features.double(), dim=-1)
    return unit @ unit.mT


def text_score(pictures: Tensor, text: Tensor) -> Tensor:
    """CLIP score 100 max(cos, 0) of embedded pictures (B, C) with an embedded text (1, C), (B,). arXiv:2104.08718."""
    return 100 * F.cosine_similarity(pictures.double(), text.double()).clamp(min=0)


def direction_score(source: Tensor, edited: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Cosine (B,) between what changed in the pictures and what changed in the texts, of embeddings (B, C), (1, C).

    cos(E(edited) - E(source), T(after) - T(before)): Gal et al., StyleGAN-NADA, arXiv:2108.00946, eq. 3.
    """
    return F.cosine_similarity(edited.double() - source.double(), after.double() - before.double())


def frame_consistency(pictures: Tensor) -> Tensor:
    """Mean cosine of all pairs of frames' embeddings (B, C), a scalar; nan for a single one.

    CLIP-temp as ContextDiff reports it: "the average cosine similarity between all pairs of video frames".
    """
    similar = self_similarity(pictures[None])[0]
    frames = len(similar)
    return (similar.sum() - similar.diagonal().sum()) / (frames * (frames - 1)) if frames > 1 else similar.new_tensor(
        torch.nan
    )  # fmt: skip


def frame_change(pictures: Tensor) -> Tensor:
    """Mean absolute change from frame to frame, a scalar; nan for a single one."""
    return (pictures[1:].double() - pictures[:-1].double()).abs().mean()
