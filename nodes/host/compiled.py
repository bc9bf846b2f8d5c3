"""Models that are compiled (the host's TorchCompileModel): what stands in their layers runs between the compiled parts.

The host lets torch.compile take everything in a model call's options for constant, without a look at it later. A patch
that was compiled along would do at every step what it did at the first one, whatever step, window or source it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Patch = TypeVar("Patch", bound=Callable)


def not_compiled(patch: Patch) -> Patch:
    """What the host calls within the network, kept out of what torch.compile makes of it. Costs a microsecond."""
    return torch.compiler.disable(patch)


def uncompiled(patched: Any) -> None:
    """Let a clone run as it is, for a gradient: it exchanges weights and layers, which nothing compiled notices."""
    from comfy.patcher_extension import WrappersMP

    patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "torch.compile")
