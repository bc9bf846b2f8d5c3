"""Keys and values that a layer's queries look at, put together from the edit's own and the sources'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Keys and values (R or 1, M, C) of one origin; bias (R or 1, M), added to the scores of its keys, or None."""

    key: Tensor
    value: Tensor
    bias: Tensor | None = None

    @property
    def count(self) -> int:
        """Tokens M."""
        return self.key.shape[1]

    def for_every_tile(self, tiles: int) -> Part:
        """With each row repeated for the tiles that another node cut of it."""

        def repeated(tensor: Tensor | None) -> Tensor | None:
            alike = tensor is None or len(tensor) == 1 or tiles == 1
            return tensor if alike else tensor.repeat_interleave(tiles, 0)

        return Part(repeated(self.key), repeated(self.value), repeated(self.bias))

    def cut_into(self, tiles: int) -> Part:
        """With each row cut into tiles, as HyperTile cuts the queries."""
        if tiles == 1:
            return self
        rows = len(self.key) * tiles
        return Part(*(t.reshape(rows, -1, t.shape[-1]) for t in (self.key, self.value)))


class Tokens:
    """What the queries of a layer look at: its own tokens, unless a source stands in their place, and those added."""

    def __init__(self, key: Tensor, value: Tensor):
        self.own, self.replaced = Part(key, value), False
        self.added: list[Part] = []

    def joined(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(keys, values, bias on the scores or None) for a query (R, N, C); bias (N, M), or (R, N, M) if rows differ.

        Where another node tiles the queries (more rows than keys), the layer's own keys are split as the host splits
        them, and every tile looks at the whole source.
        """
        rows, queries = query.shape[:2]
        tiles = rows // len(self.own.key)
        own = [] if self.replaced else [self.own.cut_into(tiles)]
        parts = [*own, *(part.for_every_tile(tiles) for part in self.added)]
        if len(parts) == 1 and parts[0].bias is None:
            return parts[0].key, parts[0].value, None
        key, value = (
            torch.cat([tensor.expand(rows, -1, -1) for tensor in tensors], 1)
            for tensors in ([part.key for part in parts], [part.value for part in parts])
        )
        return key, value, joined_bias(parts, key, queries)


def joined_bias(parts: list[Part], key: Tensor, queries: int) -> Tensor | None:
    """The bias on the scores of joined keys (R, M, C), 0 for parts without one: (N, M), or (R, N, M) if rows differ."""
    given = [part.bias for part in parts if part.bias is not None]
    if not given:
        return None
    rows = len(key) if any(len(bias) > 1 for bias in given) else 1
    biases = [key.new_zeros(rows, part.count) if part.bias is None else part.bias.expand(rows, -1) for part in parts]
    bias = torch.cat(biases, 1)[:, None].expand(-1, queries, -1)
    return bias if rows > 1 else bias[0]
