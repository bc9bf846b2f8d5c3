"""Training MGIE's edit head and its tokens [IMG0..7] beside an instruction model (arXiv:2309.17102, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .edit_head import EditMapper

EDIT_SHARE = 0.5


def joint_loss(words: Tensor, edit: Tensor, share: float = EDIT_SHARE) -> Tensor:
    """L_all = L_ins + 0.5 L_edit.                                              arXiv:2309.17102, section 3.2

    words L_ins, the cross-entropy of the expressed instruction; edit L_edit, the denoising loss. (B,) twice -> (B,).
    """
    return words + share * edit


def spoken_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """L_ins = - mean_t log p(w_t | what came before): the cross-entropy of an answer.

    logits (T, V), of the states that say the tokens w (T,) -> () in float32 at least.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, tokens)


def with_rows(logits: Tensor, states: Tensor, rows: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits in which some tokens are said by rows of their own:  z_i = h . r_i.

    logits (..., V), states h (..., D), rows r (n, D), tokens: the n places in V -> (..., V), with a gradient into r.
    """
    places = torch.tensor(list(tokens), device=logits.device)
    return logits.index_copy(-1, places, (states @ rows.to(states).T).to(logits))


def prompt_error(prompt: Tensor, wanted: Tensor) -> Tensor:
    """|T(states) - CLIP(expressed)|^2 of each prompt, averaged over its elements.

    Ours: a head from nothing first learns to say what the U-Net's own text encoder says, which needs no U-Net.
    prompt, wanted (B, L, C) -> (B,) in float32.
    """
    return (prompt.float() - wanted.float()).square().flatten(1).mean(1)


@torch.no_grad()
def begin_where_texts_are(head: EditMapper, states: Tensor, prompts: Tensor, small: float = 0.3) -> None:
    """Let a random head begin where states and prompts lie, so that it need not find their means by small steps. Ours.

        llm2hid   W <- Q whiten(states),  b <- - W m     m the mean state, Q a random rotation
        hid2feat  W <- V / g,  b <- f                    f the mean token of the prompts, V their principal directions
        query     g (mean prompt - f) V                  so that the decoder's last norm hands the mean prompt on

    with the decoder's branches weighed down to `small`. What tells one text from another is a small part of a language
    model's states, in directions far weaker than what all of them share: whitened, none has to be found first.
    states (B, 8, hidden) with the embeddings added, prompts (B, queries, context), all of like texts.
    """
    width, rows = head.config.width, states.double().flatten(0, 1)
    mean = rows.mean(0)
    rotation = torch.nn.init.orthogonal_(torch.empty(width, width)).to(rows)
    weight = rotation @ whitening(rows - mean, width)
    head.llm2hid.weight.copy_(weight)
    head.llm2hid.bias.copy_(-weight @ mean)
    tokens = prompts.double().flatten(0, 1)
    centre = tokens.mean(0)
    _, directions = principal(tokens - centre, width)
    codes = (prompts.double().mean(0) - centre) @ directions
    gain = (width / codes.square().sum(1).mean().clamp_min(1e-12)).sqrt()
    head.query.copy_((gain * codes)[None])
    head.hid2feat.weight.copy_(directions / gain)
    head.hid2feat.bias.copy_(centre)
    for layer in head.mapper.decoder.layers:
        for branch in (layer.self_attn.out_proj, layer.multihead_attn.out_proj, layer.linear2):
            branch.weight.mul_(small)


def whitening(centred: Tensor, count: int, floor: float = 1e-3) -> Tensor:
    """W (count, C) = diag(1 / sqrt(l + floor mean(l))) V^T, so that W x has about the same spread in every direction.

    rows (N, C) around 0, of which l are the variances along their principal directions V.
    """
    variances, directions = principal(centred, count)
    return (directions / (variances + floor * variances.mean()).clamp_min(1e-12).sqrt()).T


def principal(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(variances (count,), directions (C, count)) in which rows (N, C) around 0 differ most; 0 where C has fewer."""
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    lacking = max(0, count - len(variances))
    found = variances.clamp_min(0).flip(0)[:count], vectors.flip(1)[:, :count]
    return tuple(F.pad(each, (0, lacking)) for each in found)
