"""A language model that is told an expressed text: its states at [IMG0..7] and how well it says them, with a gradient.

The model itself stays as it is. What stands before [IMG0] has no gradient and is read once, its keys and values kept:
only the eight tokens are read with one, so that it costs memory for these alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.edit_head import IMAGE_TOKENS
from ...kernels.instruction_head import spoken_loss
from ..multimodal import cache_of
from .edit_head import Reading
from .llava import MgieModel


def hear(model: MgieModel, told: Reading) -> tuple[Tensor, Tensor]:
    """(states (8, D) for the edit head, cross-entropy () of text, [IMG0..7] and end) of a loaded model with `rows`.

    States are those that MgieModel.read has: the one that says [IMG0], and the ones at [IMG0] to [IMG6].
    """
    ids, opening = model.tokens(f"{told.prompt} {told.text}"), model.tokens(told.prompt)
    first = next((at for at, both in enumerate(zip(ids, opening, strict=False)) if both[0] != both[1]), len(opening))
    language, device = model.llava.language.model, model.patcher.load_device
    images = torch.tensor([model.images], device=device)
    with torch.no_grad():
        embedded = model.embedded(model.require_room(ids, IMAGE_TOKENS), told.pixels)
        kept = cache_of(language)
        text = language(inputs_embeds=embedded, use_cache=True, **kept).last_hidden_state[0, first - 1 :]
    seen = language(inputs_embeds=model.given(images), use_cache=True, **kept).last_hidden_state[0]
    wanted = [*ids[first:], *model.images, model.tokenizer.eos_token_id]
    loss = spoken_loss(model.said(torch.cat([text, seen])), torch.tensor(wanted, device=device))
    return torch.cat([text[-1:], seen[:-1]]).float(), loss


def own_rows(model: MgieModel) -> tuple[Tensor, Tensor]:
    """(given, said) (8, D) in float32: the model's own rows of [IMG0..7], or those that it has learned."""
    if model.rows is not None:
        return model.rows.given, model.rows.said
    tables = model.llava.get_input_embeddings().weight, model.llava.language.lm_head.weight
    return tuple(table[model.images].detach().float().cpu().clone() for table in tables)
