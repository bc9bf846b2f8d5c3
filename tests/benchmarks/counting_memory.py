"""The most memory that tensors without storage would have taken at once. Import it where the host can be imported.

Every storage that an operation makes counts from then until nobody holds it any more; weights that were there before
do not count, nor what a device's kernels take for themselves while they run.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from benchmarks import counting
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Memory(counting.Counter):
    """Watches what is held while operations run inside it: `held` and `peak`, in bytes."""

    def __init__(self, weights: torch.nn.Module):
        super().__init__(weights)
        self.held = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that was not seen before until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.weights or key in self.known:
            return

        def freed(_: Any) -> None:
            del self.known[key]
            self.held -= size

        self.known[key] = weakref.ref(storage, freed)
        self.held += size
        self.peak = max(self.peak, self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.hold(tensor.untyped_storage())
        return out
