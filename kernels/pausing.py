"""Where long work on a picture lets itself be stopped: kernels know no host, so whoever calls them says how."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

CHECK: ContextVar[Callable[[], None] | None] = ContextVar("palimpsest_pause", default=None)


def pause() -> None:
    """Call what `pausing` was given, which may raise; nothing outside of it."""
    if (check := CHECK.get()) is not None:
        check()


@contextlib.contextmanager
def pausing(check: Callable[[], None]) -> Iterator[None]:
    """Let `pause` call `check`, in this thread."""
    token = CHECK.set(check)
    try:
        yield
    finally:
        CHECK.reset(token)
