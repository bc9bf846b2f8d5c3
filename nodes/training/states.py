"""States of trainings: what is kept of them, and going on from one to the very same end."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from .. import host
from ..files import Shelf
from ..headers import Header, Tensors
from ..quoting import quoted
from ..settings import Settings

NEW = "(new)"
NO_STATE, LAST_STATE, EVERY_STATE = "none", "last", "with every file"
KEPT_STATES = (LAST_STATE, EVERY_STATE, NO_STATE)


def resumable(shelf: Shelf) -> list[str]:
    """States of trainings to go on from, after "(new)"."""
    return [NEW, *shelf.listed()]


def kept_states(keep_state: str, ends: list[str]) -> list[str]:
    """Behind which endings of files a state is kept; the end's own is empty."""
    return {NO_STATE: [], LAST_STATE: [""], EVERY_STATE: ends}[keep_state]


def load_state(shelf: Shelf, file: str, settings: Settings, free: Collection[str]) -> dict[str, Tensor] | None:
    """The state of a training, None for a new one; free: settings that may be others than it was made with.

    A state of an earlier version knows no setting that came since: it has that one's default.

    Raises ValueError for a damaged file, and for other settings than its own.
    """

    if file == NEW:
        return None

    def from_file(header: Header, tensors: Tensors) -> tuple[dict, dict[str, Tensor]]:
        tensors.require("step", kinds=("I64",))
        before, found = header.json("settings", dict), dict(tensors)
        if not all(map(host.is_finite, found.values())):
            raise ValueError("it holds NaN or infinite values")
        if int(found["step"]) < 0:
            raise ValueError(f"it has taken {int(found['step'])} steps")
        return before, found

    before, state = shelf.read(shelf.path(file), from_file)
    before = type(settings)().named() | before
    other = [name for name, value in settings.named().items() if name not in free and before.get(name) != value]
    if other:
        changes = ", ".join(
            f"{name} {quoted(before.get(name))} then, {quoted(getattr(settings, name))} now" for name in other[:3]
        )
        raise ValueError(f"{file} goes on only with the settings it was made with ({changes}): set them as they were.")
    return state
