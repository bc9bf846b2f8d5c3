"""What nodes of others have put on a model, by the name of the node, for errors that say what is in the way."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .joint import JOINT

PACK = __name__.partition(".nodes.")[0]

# The host's places for functions that join a positive prediction and a negative one, or change what came of them.
GUIDANCE = (
    "sampler_calc_cond_batch_function",
    "sampler_pre_cfg_function",
    "sampler_cfg_function",
    "sampler_post_cfg_function",
)
ALWAYS_NEGATIVE = "disable_cfg1_optimization"  # the host's switch: a negative prompt is computed at guidance 1, too


def every_function(found: Any) -> Iterator[Any]:
    """The functions in one of the host's places, which are lists, dictionaries and single ones."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        for part in found:
            yield from every_function(part)
    elif found is not None:
        yield found


def maker(function: Any) -> Any:
    """The function or class whose module and name tell which node made it."""
    function = getattr(function, "func", function)
    return function if hasattr(function, "__qualname__") else type(function)


def is_ours(function: Any) -> bool:
    """Whether a node of this pack made a function."""
    return str(maker(function).__module__).partition(".nodes.")[0] == PACK


def node_name(function: Any) -> str:
    """The title of the node that made a function where its class has one, else that class's name or the module's."""
    made, module = maker(function), sys.modules.get(maker(function).__module__)
    name = made.__qualname__.partition(".")[0]
    node = getattr(module, name, None)
    if not hasattr(node, "define_schema"):
        return name if isinstance(node, type) else str(made.__module__).rpartition(".")[2]
    return node.define_schema().display_name or name


def names(functions: Iterable[Any]) -> str:
    """The nodes of others that made some functions, each once, in words; "" where all are ours."""
    return ", ".join(dict.fromkeys(node_name(each) for each in functions if not is_ours(each)))


def guiding_nodes(model: Any) -> str:
    """Nodes of others with a guidance of their own on a MODEL, in words."""
    return names(every_function([model.model_options.get(key) for key in GUIDANCE]))


def guidance_left_out(model: Any) -> str:
    """What a report adds where a run without guidance goes on without that of other nodes; "" where there is none."""
    found = guiding_nodes(model)
    return f"; the guidance of other nodes was left out ({found})" if found else ""


def patching_nodes(model: Any) -> str:
    """Nodes of others that have patched a MODEL's network or guidance, in words."""
    options = model.model_options.get("transformer_options", {})
    within = [options.get("patches"), options.get("patches_replace"), options.get("optimized_attention_override")]
    return names(every_function([*within, *(model.model_options.get(key) for key in GUIDANCE)]))


def without_guidance(model_options: dict) -> dict:
    """Options in which no other node's guidance acts: at guidance 1 the negative prediction they look at is empty."""
    kept = {}
    for key in (key for key in GUIDANCE if key in model_options):
        ours = [each for each in every_function(model_options[key]) if is_ours(each)]
        if ours:
            kept[key] = ours if isinstance(model_options[key], list) else ours[0]
    left = {key: value for key, value in model_options.items() if key not in (*GUIDANCE, ALWAYS_NEGATIVE)}
    return left | kept


# Of PyTorch's errors those that tell of a function no gradient can go through.
NO_GRADIENT = ("Inference tensors cannot be saved", "modified by an inplace operation", "backward through the graph")


@contextmanager
def refused_by_name(model: Any, technique: str) -> Iterator[None]:
    """Where a gradient fails in what another node does, raise ValueError with the names of those on the model."""
    try:
        yield
    except RuntimeError as error:
        found = patching_nodes(model)
        if not found or not any(sign in str(error) for sign in NO_GRADIENT):
            raise
        raise ValueError(
            f"{technique} needs a gradient, and another node on this model has none: {found}. Connect the model from "
            "before that node; it may act while the edit is sampled."
        ) from error


def looks_into_blocks(model: Any) -> bool:
    """Whether nodes on a transformer's MODEL act between its blocks or in their attention, ours or others'."""
    from comfy.patcher_extension import WrappersMP

    options = model.model_options.get("transformer_options", {})
    patches = (*options.get("patches", {}).values(), *options.get("patches_replace", {}).values())
    return any(patches) or bool(model.get_wrappers(WrappersMP.APPLY_MODEL, JOINT))
