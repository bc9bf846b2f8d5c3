"""Numbers that say how much an edit kept, and how well it follows its text. Pictures are (B, H, W, 3) in 0..1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11


def mse(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference (B,) in float64; weight (B, H, W): over these pixels, each as much as its weight.

    nan where no pixel has weight.
    """
    squares = (a.double() - b.double()).square().mean(-1)
    weight = torch.ones_like(squares) if weight is None else weight.double()
    return (squares * weight).sum((1, 2)) / weight.sum((1, 2))


def psnr(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,), of pictures in 0..1; weight as for mse."""
    return decibels(mse(a, b, weight))


def decibels(error: Tensor) -> Tensor:
    """-10 log10 of a mean squared difference of values in 0..1; infinite where there is none.

    kornia.metrics.psnr is the same of a whole batch's one error: it knows neither single pictures nor weights.
    """
    return -10 * torch.log10(error)


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of every window that lies within the picture, (B, H - 10, W - 10), mean over colours.

    ((2 mu_a mu_b + C1)(2 cov + C2)) / ((mu_a^2 + mu_b^2 + C1)(var_a + var_b + C2)), C1 = 0.01^2, C2 = 0.03^2, with a
    Gaussian window of 11 x 11 pixels and spread 1.5: Wang et al. 2004, eq. 13. Raises ValueError for smaller
    pictures.
    """
    from kornia.metrics import ssim  # the host requires it, but starts without it: so does the pack

    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"ssim needs pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {a.shape[2]} x {a.shape[1]}"
        )
    x, y = (t.double().movedim(-1, 1) for t in (a, b))
    return ssim(x, y, SSIM_WINDOW, eps=0.0, padding="valid").mean(1)


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


def multimodal_score(given: Tensor, drawn: Tensor) -> Tensor:
    """100 mean_i max(cos(E(g_i), E(d_i)), 0): how alike a prompt's objects and those of the picture are, a scalar.

    given, drawn (n, C): embeddings of the n objects that a prompt shows, and of the parts of the picture drawn for it
    that show the same objects; a row of zeros where the picture has none, which counts 0. "The average CLIP similarity
    between objects in the input prompt and corresponding objects in the output image": MUMU, arXiv:2406.18790, section
    7, which adds that "it was not a useful guide for model quality": pasted objects score best. The scale is
    text_score's; what an object that is missing counts is not said there.
    """
    if given.ndim != 2 or given.shape != drawn.shape or len(given) == 0:
        raise ValueError(f"multimodal_score: need (n, C) twice, got {tuple(given.shape)} and {tuple(drawn.shape)}")
    return 100 * F.cosine_similarity(given.double(), drawn.double()).clamp(min=0).mean()


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
    if frames < 2:
        return similar.new_tensor(torch.nan)
    return (similar.sum() - similar.diagonal().sum()) / (frames * (frames - 1))


def frame_change(pictures: Tensor) -> Tensor:
    """Mean absolute change from frame to frame, a scalar; nan for a single one."""
    return (pictures[1:].double() - pictures[:-1].double()).abs().mean()
