"""ControlNets and T2I-Adapters in a model call that the sampler does not make itself."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from .call import RUN


def is_adapter(control: Any) -> bool:
    """Whether a T2I-Adapter is among a control and those before it."""
    from comfy.controlnet import T2IAdapter

    while control is not None:
        if isinstance(control, T2IAdapter):
            return True
        control = getattr(control, "previous_controlnet", None)
    return False


def own_control(control: Any) -> Any:
    """A copy of a control, and of those before it, that has seen no hint yet; its network is shared."""
    own = copy.copy(control)
    own.cond_hint = None
    if hasattr(own, "control_input"):
        own.control_input = None
    if own.previous_controlnet is not None:
        own.previous_controlnet = own_control(own.previous_controlnet)
    return own


def with_own_adapters(prompt: list[dict], model_options: dict) -> list[dict]:
    """A guider's prompt for a call of fewer rows than the sampler's, with T2I-Adapters of its own.

    The host keeps an adapter's features for as many rows as the first call has, and leaves the adapter out of every
    call of other rows, with a line in the log. They are copied once a run.
    """
    run = model_options.get("transformer_options", {}).get(RUN)

    def own(cond: dict) -> dict:
        control = cond.get("control")
        if not is_adapter(control):
            return cond
        return cond | {"control": run.kept((__name__, id(control)), partial(own_control, control))}

    return prompt if run is None else [own(cond) for cond in prompt]
