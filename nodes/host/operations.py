"""Layers of the host for networks that the pack builds itself."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def whole(operations: Any) -> Any:
    """A set of the host's layers (of comfy.ops) that have their weights from the start.

    Where the host's dynamic memory acts, its linear layers and tables begin without weights and get them from
    load_state_dict alone: such a network tells no names and shapes, and cannot begin from a seed. It leaves layers with
    a way of loading of their own as torch makes them.
    """

    class Linear(operations.Linear):
        def _load_from_state_dict(self, *given: Any) -> None:
            super()._load_from_state_dict(*given)

    class Embedding(operations.Embedding):
        def _load_from_state_dict(self, *given: Any) -> None:
            super()._load_from_state_dict(*given)

    return type(operations.__name__, (operations,), {"Linear": Linear, "Embedding": Embedding})
