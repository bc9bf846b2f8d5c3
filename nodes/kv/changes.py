"""What an edit changes, as people say it, and what Apply KV is then set to.

Source guidance insists on what the picture looked like. That is what an action or another species wants, and what keeps
a new colour from coming; a new place comes only where the old one cannot be looked at (docs/results.md, What changes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..settings import AS_SET, AS_SET_ABOVE
from .settings import ApplySettings

ACTION, COLOUR, PLACE, SPECIES = "action", "colour or material", "place", "species"


@dataclass(frozen=True)
class Change:
    """Settings of Apply KV for one kind of edit. needs_source_mask: it is made with the subject alone in view."""

    source_guidance: float
    start_percent: float
    needs_source_mask: bool = False

    def values(self) -> dict[str, Any]:
        """What it replaces: ways to look at the source other than extend were not measured for it."""
        return {"mode": "extend", "source_guidance": self.source_guidance, "start_percent": self.start_percent}


CHANGES = {
    ACTION: Change(3.0, 0.1),
    COLOUR: Change(1.0, 0.1),
    PLACE: Change(3.0, 0.1, needs_source_mask=True),
    SPECIES: Change(3.0, 0.1),
}
OPTIONS = (AS_SET_ABOVE, *CHANGES)


def settled(chosen: dict[str, Any], what_changes: str, has_source_mask: bool) -> tuple[ApplySettings, str]:
    """(settings for what is changed, what is said of them). Raises ValueError where a preset sets them as well."""
    settings, change = ApplySettings.of(chosen), CHANGES.get(what_changes)
    if change is None:
        return settings, ""
    preset = chosen.get("preset", AS_SET)
    if preset != AS_SET:
        raise ValueError(
            f"preset is {preset!r} and what_changes {what_changes!r}, and both set how the source is looked at: leave "
            f"one of them at {AS_SET!r} or {AS_SET_ABOVE!r}."
        )
    values = change.values()
    said = f"{what_changes}: " + ", ".join(f"{name} {value}" for name, value in values.items())
    if change.needs_source_mask and not has_source_mask:
        said += "; connect source_mask, white over the subject, or the old place comes back"
    return replace(settings, **values), said
