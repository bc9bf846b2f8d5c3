"""Settings of nodes: filled by name, from the ids of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from .quoting import quoted

AS_SET, AS_SET_ABOVE = "as set below", "as set above"  # where the combo stands above the values, and below

Chosen = TypeVar("Chosen", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of a technique's settings: a dataclass whose fields are the ids of its node's inputs.

    PRESETS: what an input `preset` replaces, by the preset's name; an unnamed preset replaces nothing.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def of(cls: type[Chosen], chosen: Mapping[str, Any]) -> Chosen:
        """The settings a node was given, by input id. Raises TypeError, in a sentence, for an id that is no field."""
        given, known = dict(chosen), [field.name for field in fields(cls)]
        preset = cls.PRESETS.get(given.pop("preset", AS_SET), {})
        odd = sorted(given.keys() - set(known))
        if odd:
            raise TypeError(f"this node has no input {quoted(odd[0])}, it has {', '.join(known)}: take it out.")
        return cls(**given | preset)

    def named(self) -> dict[str, Any]:
        """Every field by its name, for reports and file headers."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
