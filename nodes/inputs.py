"""Inputs that several nodes have, and their checks: one id, one range and one error for one thing."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from comfy_api.latest import io

from . import host, sockets

MAX_SEED = 0xFFFFFFFFFFFFFFFF


def completed(*needed: str) -> Callable[[Callable[..., io.Schema]], Callable[..., io.Schema]]:
    """Decorator of define_schema, for what all our schemas have in common.

    Widgets with a default are optional inputs, except those `needed`: the host refuses a graph of the API that leaves
    a required input out, whatever its default; one that is left out has the default of the node's settings. Needed is
    what only a person can say: a prompt, a file. What a node tells is in the history of every prompt, also of those
    for which the host takes the node from its cache (from 0.24 on).
    """

    def decorated(define_schema: Callable[..., io.Schema]) -> Callable[..., io.Schema]:
        @functools.wraps(define_schema)
        def complete(*args: Any, **kwargs: Any) -> io.Schema:
            schema = define_schema(*args, **kwargs)
            for entry in schema.inputs:
                if has_default(entry) and entry.id not in needed:
                    entry.optional = True
            if schema.hidden and hasattr(schema, "has_intermediate_output"):
                schema.has_intermediate_output = True
            return schema

        return complete

    return decorated


def has_default(entry: Any) -> bool:
    """Whether an input is a widget that shows a value in a new graph."""
    return getattr(entry, "default", None) is not None or bool(getattr(entry, "options", None))


def percents(start: str, end: str, default_start: float = 0.0, **more: Any) -> list[io.Float.Input]:
    """start_percent and end_percent, shares of the sampling, with what each does to the picture.

    host.Window.of makes noise levels of them; it and host.require_span refuse a start that does not lie before the end.
    """
    return [
        io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip, **more)
        for name, default, tooltip in (("start_percent", default_start, start), ("end_percent", 1.0, end))
    ]


def seed(tooltip: str, **more: Any) -> io.Int.Input:
    """A seed."""
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, tooltip=tooltip, **more)


def guidance(tooltip: str, default: float = 7.5, **more: Any) -> io.Float.Input:
    """The guidance (cfg) of a run; `require_negative` is its check."""
    return io.Float.Input("guidance", default=default, min=0.0, max=30.0, step=0.1, tooltip=tooltip, **more)


def require_negative(guidance: float, negative: list | None, name: str = "guidance") -> None:
    """Raise ValueError where guidance other than 1, from the input `name`, has no negative prompt to go by."""
    if guidance != 1.0 and negative is None:
        raise ValueError(
            f"{name} is {guidance:g}: guidance other than 1 needs the negative prompt; connect one (empty text)."
        )


def require_active(model: Any, sigmas: Iterable[float], guidance: float, **named: list | None) -> None:
    """Raise ValueError where a prompt that counts does not act at one of some noise levels; see host.require_active.

    named: the prompts by the ids of their inputs; `negative` counts where guidance is not 1.
    """
    levels = tuple(sigmas)
    for name, prompt in named.items():
        if prompt is not None and (name != "negative" or guidance != 1.0):
            host.require_active(model, prompt, levels, name)


def trajectory(tooltip: str, **more: Any) -> io.Custom.Input:
    """A trajectory; `require_same_layout` is its check."""
    return sockets.Trajectory.Input("trajectory", tooltip=tooltip, **more)


def require_same_layout(model: Any, layout: str, what: str, way_out: str) -> None:
    """Raise ValueError where something was made with another architecture than the model's."""
    if not host.same_layout(model, layout):
        raise ValueError(f"{what} with another model architecture: {way_out}.")


def prompt_note(trajectory: host.Trajectory, positive: list) -> str:
    """What a report adds where a prompt is not the one that the picture was inverted with; else nothing."""
    if trajectory.prompt == host.conditioning_fingerprint(positive):
        return ""
    return "; note: the prompt differs from the one the picture was inverted with"


def unique_id() -> list[io.Hidden]:
    """The hidden input by which a node shows text under itself."""
    return [io.Hidden.unique_id]


def grown(chosen: dict[str, Any], growing: str, prefix: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """What is connected to a growing input, by name; those of plain names (image1) are taken out of `chosen`.

    The editor names them images.image1, which the host gives as a dict; programs that write graphs say image1 as well.
    Raises ValueError for one that comes under both names.
    """
    found = dict(given or {})
    for name in [name for name in chosen if re.fullmatch(rf"{prefix}\d+", name)]:
        if found.get(name) is not None:
            raise ValueError(f"{name} and {growing}.{name} are both connected and are one input: disconnect one.")
        found[name] = chosen.pop(name)
    return found


def source_features(tooltip: str) -> io.Combo.Input:
    """Where what a technique knows of a source comes from; host.chosen_source acts on it."""
    return io.Combo.Input("source_features", options=list(host.SOURCE_FEATURES), advanced=True, tooltip=tooltip)
