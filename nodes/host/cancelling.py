"""Work of seconds that a cancelled run stops: torch's operations one by one, files piece by piece."""

from __future__ import annotations

import io
from typing import Any

from torch.overrides import TorchFunctionMode


def stop_if_cancelled() -> None:
    """Raise the host's exception where the run was cancelled."""
    import comfy.model_management

    comfy.model_management.throw_exception_if_processing_interrupted()


class Cancellable(TorchFunctionMode):
    """Within it, the host is asked before every operation of torch whether the run was cancelled.

    For what others programmed as one call: a forward pass on a CPU, reading a model, a filter over a large picture.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        stop_if_cancelled()
        return function(*args, **(kwargs or {}))


class CancellableFile(io.FileIO):
    """A file whose readers and writers are stopped between two pieces; Pillow's take 64 KiB at a time."""

    def read(self, size: int = -1, /) -> bytes | None:
        stop_if_cancelled()
        return super().read(size)

    def write(self, data: Any, /) -> int:
        stop_if_cancelled()
        return super().write(data)

    def fileno(self) -> int:
        """None: Pillow would write past `write`, in one piece."""
        raise io.UnsupportedOperation("fileno")
