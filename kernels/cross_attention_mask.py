"""Cross-attention masks: where in the picture which words may act (eq. 2 of the paper; PFB-Diff, arXiv:2306.16894)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

ALIGNMENT = 8  # keys: fused attention wants the rows of its bias to begin at multiples of so many numbers

# ---- the equations, on a layer's whole matrix of scores S = Q K^T / sqrt(d) ------------------------------------------


def after_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """A_masked = A (.) M with A = softmax(S): words lose weight and nothing takes it over.             eq. 2

    scores (..., N, T) over N places and T tokens; mask M, broadcast to it, in 0..1. The paper's M (H, W) is the same
    for all tokens: (N, 1). Rows need not sum to 1; a row whose mask is 0 everywhere sees no text at all.
    """
    return torch.softmax(scores, -1) * mask


def renormalised(scores: Tensor, mask: Tensor) -> Tensor:
    """A M / sum_k A_k M_k: what a word loses goes to the other words, in proportion to what they have.

    It is computed as softmax(S + log M), which is the same: e^s m / sum_k e^(s_k) m_k. A row that is masked in every
    token is left unmasked; that is what masks that fall to 0 in all tokens alike tend to.

    scores (..., N, T), mask broadcast to it, in 0..1. Rows sum to 1 and are never NaN.
    """
    mask = mask.expand_as(scores)
    return torch.softmax(scores + torch.where((mask > 0).any(-1, keepdim=True), mask, 1.0).log(), -1)


def before_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """softmax of S with -max in place of the scores of masked words: PFB-Diff, as its authors' code has it.

    The mask is cut at 0.5 first. Then it is `renormalised` of the cut mask, except in a row that is masked in every
    token: equal scores of -max give equal weights to all tokens there. (Their mask is scaled to the layer bicubically;
    the caller scales it here.)
    """
    return torch.softmax(scores.masked_fill(mask < 0.5, -torch.finfo(scores.dtype).max), -1)


def masked(scores: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Both kinds of masks in one matrix: `renormalised` by `before`, then multiplied by `after`; broadcast to S."""
    return renormalised(scores, before) * after


# ---- the same without the matrix, inside one call of fused attention -------------------------------------------------


def biased_keys(before: Tensor, after: Tensor, tokens: Sequence[int], keys: int) -> tuple[Tensor | None, Tensor]:
    """The keys and the bias with which fused attention computes `masked`.

    With R = before, M = after, and S_ the tokens with an M other than 1, whose keys come twice:

        K' = [K; K_S_]    V' = [V; 0]    bias = [log(R M); log(R (1 - M_S_))]

    The second copies carry the weight that M takes away to values of 0. So the denominator stays sum_k e^s R, and

        sum_k e^s R M V / sum_k (e^s R M + e^s R (1 - M)) = (renormalised(S, R) M) V

    before, after (..., N, len(tokens)) in 0..1: the weights of `tokens` of a layer with so many `keys`; all other
    tokens weigh 1. Returns the index of K' in K (M',), or None where no key comes twice, and bias (..., N, M') in
    their dtype. M' is a multiple of 8; keys that this adds have -inf. No row has it everywhere, so nothing becomes NaN.
    """
    before = torch.where(before.sum(-1, keepdim=True) + (keys - len(tokens)) > 0, before, 1.0)
    twice = [i for i in range(len(tokens)) if bool((after[..., i] != 1).any())]
    count = keys + len(twice)
    bias = before.new_full((*before.shape[:-1], count + -count % ALIGNMENT), -math.inf)
    bias[..., :keys] = 0
    bias[..., list(tokens)] = (before * after).log()
    if not twice:
        return None, bias
    bias[..., keys:count] = (before * (1 - after))[..., twice].log()
    copies = [tokens[i] for i in twice]
    return torch.tensor([*range(keys), *copies, *[0] * (-count % ALIGNMENT)], device=before.device), bias


def fused(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    bias: Tensor,
    nothing: Tensor | None = None,
) -> Tensor:
    """`masked` times V by attend(query, key, value, bias), any attention with a bias on its scores.

    query (B, N, C), key and value (B, T, C) -> (B, N, C). index and bias are those of biased_keys, in attend's layout.
    nothing: zeros (B, M' - T, C), where the caller has them at hand.
    """
    if index is None:  # what M' adds stays in memory, where it keeps rows aligned
        return attend(query, key, value, bias[..., : key.shape[1]])
    if nothing is None:
        nothing = value.new_zeros(()).expand(value.shape[0], len(index) - value.shape[1], value.shape[2])
    return attend(query, key.index_select(1, index), torch.cat([value, nothing], 1), bias)


# ---- masks -----------------------------------------------------------------------------------------------------------


def weight(mask: Tensor, strength: float, outside: bool) -> Tensor:
    """The weight of a word at each place: 1 - strength (1 - m), with m the mask, or outside of it 1 - m.

    Strength 1 is the mask itself, strength 0 is 1 everywhere. Any shape.
    """
    return 1 - strength * (mask if outside else 1 - mask)


def feathered(mask: Tensor, pixels: float) -> Tensor:
    """A mask with edges that fade over about `pixels` on either side: a Gaussian of standard deviation pixels / 2.

    mask (B, H, W) in 0..1 -> the same shape; the border is continued outwards, and a mask of one value stays exactly
    that.
    """
    if pixels <= 0:
        return mask
    reach = math.ceil(1.5 * pixels)
    taps = torch.exp(-2 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / pixels) ** 2)
    taps = (taps / taps.sum()).to(mask.device)
    soft = mask.double()[:, None]
    soft = F.conv2d(F.pad(soft, (reach, reach, 0, 0), mode="replicate"), taps[None, None, None])
    soft = F.conv2d(F.pad(soft, (0, 0, reach, reach), mode="replicate"), taps[None, None, :, None])
    return soft[:, 0].to(mask.dtype).clamp(0, 1)
