"""Teaching tokens to stand for words: a connector's tokens against what a text encoder says of the words they replace.

Kosmos-G aligns its language model so (arXiv:2310.02992, section 3.2: the squared error to CLIP's text embeddings), by
queries of a fixed number. Here every token of a prompt of words and pictures has words of its own: a word itself, those
of a picture their part of the words that it is bound to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def stand_for(states: Tensor, chosen: Tensor) -> Tensor:
    """What tokens should be: t_l = sum_m a_lm s_m / sum_m a_lm, the mean of the states that each stands for.

    states s (M, C) of a text encoder; chosen a (L, M), True where token l stands for state m -> (L, C) in float32, or
    float64 where states are; zeros for tokens that stand for none.
    """
    if states.ndim != 2 or chosen.ndim != 2 or chosen.shape[1] != states.shape[0]:
        raise ValueError(
            f"stand_for: need states (M, C) and chosen (L, M), got {tuple(states.shape)} and {tuple(chosen.shape)}"
        )
    states = states.float() if states.dtype.itemsize < 4 else states
    share = chosen.to(states)
    return share @ states / share.sum(1, keepdim=True).clamp(min=1)


def token_error(tokens: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """sum_l w_l |c_l - t_l|^2 / (C sum_l w_l): how far tokens are from what they should be, for each prompt.

    tokens c, wanted t (B, L, C); weight w (B, L), at least 0 and not all 0 in a row, 0 at padding -> (B,) in float32,
    or float64 where tokens are.
    """
    if tokens.shape != wanted.shape or weight.shape != tokens.shape[:2]:
        shapes = ", ".join(str(tuple(each.shape)) for each in (tokens, wanted, weight))
        raise ValueError(f"token_error: need (B, L, C) twice and (B, L), got {shapes}")
    tokens = tokens.float() if tokens.dtype.itemsize < 4 else tokens
    error = (tokens - wanted.to(tokens)).pow(2).mean(-1)
    return (error * weight).sum(1) / weight.sum(1)
