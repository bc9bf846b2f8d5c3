"""KV Inversion: content-preserving self-attention and its loss (arXiv:2309.16608, eq. 1 to 3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def content_preserving(projection: Tensor, embedding: Tensor, own: Tensor | float, learned: Tensor | float) -> Tensor:
    """Blend a layer's own keys (or values) with learned ones.

    K_bar = lambda K + gamma K_hat                                   eq. 1 (the same line serves V)
    projection K (B, N, C), embedding K_hat (B or 1, N, C); own = lambda, learned = gamma: numbers or (B or 1, 1, 1).
    Returns (B, N, C) in K's dtype. Raises ValueError when the token grids or channels differ.
    """
    if projection.shape[1:] != embedding.shape[1:]:
        raise ValueError(
            f"content_preserving: the learned embedding is for {tuple(embedding.shape[1:])} tokens x channels, "
            f"this layer has {tuple(projection.shape[1:])}"
        )
    return (own * projection + learned * embedding).to(projection.dtype)


def content_preserving_folded(projection: Tensor, folded: Tensor, own: Tensor) -> Tensor:
    """content_preserving in one pass over memory, for sampling, where gamma K_hat is known beforehand.

    K_bar = (gamma K_hat) + lambda K
    With a mask m on the tokens (1: learned keys act, 0: the layer's own stay) the same line serves:
    K + m (lambda K + gamma K_hat - K) = (m gamma K_hat) + (1 + m (lambda - 1)) K.

    projection K (B, N, C), folded (B or 1, N, C), own (B or 1, N or 1, 1), all of one dtype -> (B, N, C).
    """
    return torch.addcmul(folded, own, projection)


def between_keyframes(before: Tensor, after: Tensor, share: Tensor | float) -> Tensor:
    """psi_t between two learned steps, on the straight line: (1 - s) psi_a + s psi_b, s = (t_a - t) / (t_a - t_b)."""
    return before + share * (after - before)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V per head: eq. 2, written out.

    query (B, N, H*D), key and value (B, M, H*D) -> (B, N, H*D). The pack never runs this in sampling (the host's fused
    attention does the same); it is what the adapters are tested against.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def source_guidance(guided: Tensor, shown: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Guide a denoised picture towards the source, as classifier-free guidance guides it towards the text.

    x_0 = D(no text, no source) + s (D(no text, source) - D(no text, no source))
          + w (D(text, source) - D(no text, source))
    which is guidance on two conditions as InstructPix2Pix writes it (arXiv:2211.09800, eq. 3), with the source's keys
    and values in place of its input picture. `guided` already has the part with w, the source everywhere, so this adds
    (s - 1) (D(no text, source) - D(no text, no source)). Not part of KV Inversion.

    guided, shown, hidden (B, C, H, W): with guidance; without text but with the source; without both. scale = s, where
    1 gives `guided` back.
    """
    return guided + (scale - 1.0) * (shown - hidden)


def reconstruction_loss(latent: Tensor, target: Tensor, signal: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """L_rec = || z^_{t-1} - z~_{t-1} ||^2 per picture, averaged over its elements.       eq. 3

    latent, target (B, C, H, W) in the host's x = z / sqrt(abar); signal = sqrt(abar_{t-1}), a number or (B, 1, 1, 1),
    takes them to the paper's z. mask (B, 1, H, W) in 0..1 averages over its white part only (not in the paper).
    Returns (B,) in float32.
    """
    squares = ((latent.float() - target.float()) * signal).pow(2)
    if mask is None:
        return squares.flatten(1).mean(1)
    return (squares * mask).flatten(1).sum(1) / mask.expand_as(squares).flatten(1).sum(1)


def self_similarity_distance(keys: Tensor, others: Tensor) -> Tensor:
    """How far the layout of two pictures differs: mean (S - S')^2, S_ij = cos(k_i, k_j) over all pairs of tokens.

    The structure loss of Splice (Tumanyan et al., arXiv:2201.00424, eq. 4), with the U-Net's self-attention keys in
    place of DINO's. keys, others (B, N, C) -> (B,) in float32.
    """
    similar, similar_others = (k @ k.mT for k in (F.normalize(t.float(), dim=-1) for t in (keys, others)))
    return (similar - similar_others).pow(2).flatten(1).mean(1)
