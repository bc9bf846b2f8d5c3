"""A language model of transformers that goes on with a text, token by token, with its keys and values kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....kernels.greedy_decoding import Limits, go_on
from ...host.cancelling import Cancellable


def decode(
    language: Any,
    given: Mapping[str, Any],
    ids: Sequence[int],
    *,
    embed: Callable[[Tensor], Tensor],
    speak: Callable[[Tensor], Tensor],
    limits: Limits,
    positions: Tensor | None = None,
    heard: Callable[[list[int]], None] = lambda written: None,
) -> tuple[list[int], Tensor]:
    """(tokens, states (N, D)) that a language model without its head goes on with; see greedy_decoding.go_on.

    given: the text so far, of tokens ids, by the names of the model's inputs: inputs_embeds (1, L, D) and what belongs
    to it. embed: tokens (1, n) as the model is given them; positions
    (axes, 1, L) where it does not count them itself. A cancelled run ends between two operations.
    """
    kept, device = cache_of(language), given["inputs_embeds"].device

    def read(token: int | None) -> Tensor:
        if token is None:
            now, where = given, positions
        else:
            now = {"inputs_embeds": embed(torch.tensor([[token]]).to(device))}
            where = None if positions is None else next_positions(positions, kept)
        more = {} if where is None else {"position_ids": where.to(device)}
        return language(**now, use_cache=True, **kept, **more).last_hidden_state[0]

    with torch.no_grad(), Cancellable():
        return go_on(read, speak, ids, limits, heard)


def next_positions(positions: Tensor, kept: dict[str, Any]) -> Tensor:
    """(axes, 1, 1): where the next token stands, of a text that began at positions (axes, 1, L)."""
    behind = next(iter(kept.values())).get_seq_length() - positions.shape[-1]
    return torch.full((positions.shape[0], 1, 1), int(positions.max()) + 1 + behind)


def cache_of(language: Any) -> dict[str, Any]:
    """An empty cache of keys and values under the name by which the model's forward takes it."""
    from transformers import DynamicCache

    named = inspect.signature(type(language).forward).parameters
    return {"cache" if "cache" in named else "past_key_values": DynamicCache()}
