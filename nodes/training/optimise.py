"""How weights learn from a gradient: AdamW, with the gradient's norm limited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

CLIP_NORM, WEIGHT_DECAY = 1.0, 1e-2  # as ContextDiff's authors release them; MUMU does not say


def adamw(parameters: Iterable[Tensor], rate: float, device: torch.device | None = None) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101). On a known device its fused form, which asks the device for nothing."""
    fused = device is not None and device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY, fused=fused or None)


def divide_gradients(tensors: Iterable[Tensor], scale: float) -> None:
    """Undo a factor on the loss, by which half-precision gradients within a network stay clear of underflow."""
    for tensor in tensors:
        if tensor.grad is not None:
            tensor.grad.div_(scale)


def clip_gradients(tensors: Sequence[Tensor]) -> Tensor:
    """Bring the norm of all gradients together to at most CLIP_NORM; returns what it was."""
    return nn.utils.clip_grad_norm_(tensors, CLIP_NORM)
