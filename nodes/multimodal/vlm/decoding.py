"""A language model of transformers that goes on with a text, token by token, with its keys and values kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....kernels.greedy_decoding import Limits, go_on
from ...host.cancelling import Cancellable


def decode(
    language: Any,
    embedded: Tensor,
    ids: Sequence[int],
    *,
    embed: Callable[[Tensor], Tensor],
    speak: Callable[[Tensor], Tensor],
    limits: Limits,
    positions: Tensor | None = None,
    heard: Callable[[list[int]], None] = lambda written: None,
) -> tuple[list[int], Tensor]:
    """(tokens, states (N, D)) that a language model without its head goes on with; see greedy_decoding.go_on.

    embedded (1, L, D): the text so far, of tokens ids. embed: tokens (1, n) as the model is given them; positions
    (axes, 1, L) where it does not count them itself. A cancelled run ends between two operations.
    """
    kept, last = cache_of(language), 0 if positions is None else int(positions.max())

    def read(token: int | None) -> Tensor:
        nonlocal last
        given, where = (
            (embedded, positions) if token is None else (embed(torch.tensor([[token]]).to(embedded.device)), None)
        )
        if token is not None and positions is not None:
            last += 1
            where = torch.full((positions.shape[0], 1, 1), last)
        more = {} if where is None else {"position_ids": where.to(embedded.device)}
        return language(inputs_embeds=given, use_cache=True, **kept, **more).last_hidden_state[0]

    with torch.no_grad(), Cancellable():
        return go_on(read, speak, ids, limits, heard)


def cache_of(language: Any) -> dict[str, Any]:
    """An empty cache of keys and values under the name by which the model's forward takes it."""
    from transformers import DynamicCache

    named = inspect.signature(type(language).forward).parameters
    return {"cache" if "cache" in named else "past_key_values": DynamicCache()}
