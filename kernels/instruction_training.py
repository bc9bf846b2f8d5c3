"""Training a U-Net that is given the source beside the noise to follow instructions: InstructPix2Pix, arXiv:2211.09800.

The paper of sections 3.2 to 3.5 without a number is the founding one, of the enhanced MGIE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .denoising_loss import picture_error

if TYPE_CHECKING:
    from torch import Tensor


def with_picture_channels(weight: Tensor, channels: int) -> Tensor:
    """[W, 0]: the first convolution with `channels` inputs more, which change nothing yet.    arXiv:2211.09800, 3.2

    weight (outputs, inputs, k, k) -> (outputs, inputs + channels, k, k) in its dtype.
    """
    outputs, _, *kernel = weight.shape
    return torch.cat([weight, weight.new_zeros(outputs, channels, *kernel)], 1)


def dropout_bands(draws: Tensor, text: float, both: float, picture: float) -> tuple[Tensor, Tensor]:
    """(which rows keep their text, which keep their picture): three bands of 0..1 side by side.        3.2.1

        u < t                  the text alone is dropped
        t <= u < t + b         both are
        t + b <= u < t + b + p the picture alone is

    The paper has 5 % for each; both guidances need rows of every kind. draws u (B,) in 0..1 -> two of bool (B,).
    Raises ValueError where the bands do not fit into 0..1.
    """
    if min(text, both, picture) < 0 or text + both + picture > 1:
        raise ValueError(
            f"the shares without text {text:g}, without both {both:g} and without picture {picture:g} are more than "
            "all steps together: lower them, 0.05 each is usual."
        )
    without_text = draws < text + both
    without_picture = (draws >= text) & (draws < text + both + picture)
    return ~without_text, ~without_picture


def two_guidances(both: Tensor, picture: Tensor, neither: Tensor, text_scale: float, picture_scale: float) -> Tensor:
    """D(0, 0) + s_I (D(I, 0) - D(0, 0)) + s_T (D(I, T) - D(I, 0)).                          arXiv:2211.09800, eq. 3

    D in place of the paper's e, of which it is a linear function. all (B, C, H, W): D(I, T) with picture and text,
    D(I, 0) with the picture, D(0, 0) with neither. At s_T = s_I = 1 it is D(I, T).
    """
    return neither + picture_scale * (picture - neither) + text_scale * (both - picture)


def towards_the_edited(noise_error: Tensor, denoised: Tensor, edited: Tensor, weight: float) -> Tensor:
    """|eps_hat - eps|^2 + lambda |D - x_edited|^2: the reconstruction is of the edited picture.    the paper's 3.5

    Both are 0 at the same D. The first divides the error of D by sigma^2, so that it learns most where little noise is;
    the second counts it as it is, so that it learns most where all is noise: what is where in the edited picture.

    noise_error (B,), weighed by noise level as it may be; denoised D, edited (B, C, H, W) -> (B,) in float32.
    """
    return noise_error if weight == 0 else noise_error + weight * picture_error(denoised, edited)


def words_within(attended: Tensor, mask: Tensor) -> Tensor:
    """(A (.) M) V = M (A V), for an M (N, 1) that is the same for all tokens.                          eq. 2

    So the text acts inside of the mask alone, and the masked attention is the plain one's values times the mask.
    attended A V (B, N, C), mask (B, N) in 0..1 -> (B, N, C) in attended's dtype.
    """
    return attended * mask[..., None].to(attended)
