"""Tensors of one step on their way from ordinary memory to the GPU, one step ahead of the sampler."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor


class PieceStream:
    """Holds the pieces of the step in use and of the one after it; nothing else stays on the device.

    On CUDA the next step's pieces are copied on a stream of their own while the current step computes. On a CPU the
    pieces are used where they lie.
    """

    def __init__(self) -> None:
        self.moved: dict[Hashable, tuple[Tensor, Any]] = {}
        self.side: Any = None

    def fetch(
        self, wanted: Mapping[Hashable, Tensor], coming: Mapping[Hashable, Tensor], device: torch.device
    ) -> dict[Hashable, Tensor]:
        """The wanted pieces on the device; copying of the coming ones begins."""
        everything = {**coming, **wanted}
        self.moved = {name: found for name, found in self.moved.items() if name in everything}
        if device.type != "cuda":
            return {name: piece.to(device) for name, piece in wanted.items()}
        for name in [*wanted, *coming]:
            if name not in self.moved:
                self.moved[name] = self.send(everything[name], device)
        current = torch.cuda.current_stream(device)
        for name in wanted:
            piece, arrived = self.moved[name]
            current.wait_event(arrived)
            piece.record_stream(current)
        return {name: self.moved[name][0] for name in wanted}

    def send(self, piece: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Start a copy on the side stream: (tensor on the device, event that says it has arrived)."""
        self.side = self.side or torch.cuda.Stream(device)
        with torch.cuda.stream(self.side):
            copy = piece.to(device, non_blocking=True)
            return copy, self.side.record_event()
