"""Inputs that nodes which train have in common: their bounds; each node says what they do to its own result."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...kernels.lora import SCHEDULES
from .optimisers import OPTIMISERS
from .states import KEPT_STATES

SHARED: dict[str, tuple[type, dict[str, Any]]] = {
    "batch_size": (io.Int.Input, {"default": 1, "min": 1, "max": 64}),
    "accumulation": (io.Int.Input, {"default": 1, "min": 1, "max": 64, "advanced": True}),
    "resolution": (io.Int.Input, {"default": 0, "min": 0, "max": 4096, "step": 64}),
    "learning_rate": (
        io.Float.Input,
        {"default": 0.0001, "min": 0.0, "max": 0.1, "step": 0.00001, "round": False},
    ),
    "schedule": (io.Combo.Input, {"options": list(SCHEDULES)}),
    "cycles": (io.Int.Input, {"default": 1, "min": 1, "max": 100, "advanced": True}),
    "warm_up": (io.Int.Input, {"default": 0, "min": 0, "max": 10000, "advanced": True}),
    "optimiser": (io.Combo.Input, {"options": list(OPTIMISERS)}),
    "weight_decay": (io.Float.Input, {"default": 0.01, "min": 0.0, "max": 1.0, "step": 0.01, "advanced": True}),
    "min_snr_gamma": (io.Float.Input, {"default": 0.0, "min": 0.0, "max": 1000.0, "step": 0.5, "advanced": True}),
    "rank": (io.Int.Input, {"default": 16, "min": 1, "max": 512}),
    "alpha": (io.Float.Input, {"default": 8.0, "min": 0.01, "max": 512.0, "step": 0.5}),
    "convolutions": (io.Boolean.Input, {"default": False, "advanced": True}),
    "checkpointing": (io.Boolean.Input, {"default": True}),
    "guidance": (io.Float.Input, {"default": 7.5, "min": 1.0, "max": 30.0, "step": 0.5, "advanced": True}),
    "keep_state": (io.Combo.Input, {"options": list(KEPT_STATES), "advanced": True}),
}


def shared(name: str, tooltip: str, **changes: Any) -> io.Input:
    """The input of this id, with what is another in one node: its default, mostly."""
    kind, values = SHARED[name]
    return kind(name, tooltip=tooltip, **values | changes)
