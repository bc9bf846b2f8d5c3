"""A step of the host's own trainer, the node TrainLoraNode, counted as Train LoRA's is.

The node itself runs, with its adapters on every weight and every bias, its guider, its sampler and its AdamW. What
meta tensors cannot is put in its place: loading, and autocast, which has no meta device. Import it where the host can
be imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import comfy.model_management
import torch
from benchmarks import counting, counting_lora
from benchmarks.counting_memory import Memory
from torch import Tensor
from torch.overrides import TorchFunctionMode

RANK = 32
NEEDED = ("TrainLoraNode", "TrainGuider", "_setup_lora_adapters", "_create_optimizer", "patch", "unpatch")
# What of the node's inputs is not as it stands there. Its depth of checkpointing is 1: the whole network is one block.
TAUGHT = {
    "rank 32": {"gradient_checkpointing": False},
    "rank 32, checkpointing": {"gradient_checkpointing": True},
    "rank 32, checkpointing, depth 2": {"gradient_checkpointing": True, "checkpoint_depth": 2},
}

# Operations that autocast runs in half precision and in float32 on CUDA, of those that a U-Net and its loss have:
# https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
HALF = {torch.nn.functional.linear, torch.nn.functional.conv2d, torch.matmul, Tensor.__matmul__, Tensor.matmul}
SINGLE = {torch.nn.functional.group_norm, torch.nn.functional.layer_norm, torch.nn.functional.mse_loss}


class Autocast(TorchFunctionMode):
    """torch.autocast for meta tensors, as it is for CUDA's."""

    def __init__(self, device: str, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, wanted = kwargs or {}, self.dtype if func in HALF else torch.float32 if func in SINGLE else None

        def cast(value: Any) -> Any:
            return value.to(wanted) if isinstance(value, Tensor) and value.is_floating_point() else value

        if wanted is not None:
            args, kwargs = tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def host_trainer() -> tuple[ModuleType | None, str]:
    """(the host's module, "") or (None, what it has not)."""
    try:
        import comfy_extras.nodes_train as trainer
    except ImportError as reason:
        return None, str(reason)
    missing = [name for name in NEEDED if not hasattr(trainer, name)]
    return (None, f"comfy_extras.nodes_train has no {', '.join(missing)}") if missing else (trainer, "")


@dataclass
class Run:
    """A whole training by the host: what was counted, its peak in bytes, and the tensors that its optimiser had."""

    cost: counting.Cost
    peak: int
    tensors: list[Tensor]


@contextlib.contextmanager
def on_meta(trainer: ModuleType, model: Any, kept: list[Tensor]) -> Iterator[None]:
    """Inside it the host's trainer runs on the meta device; `kept` is given what its optimiser gets."""
    adapters, optimiser, checkpoint = trainer._setup_lora_adapters, trainer._create_optimizer, trainer.patch

    def setup(*args: Any, **kwargs: Any) -> Any:
        with torch.device("meta"):
            return adapters(*args, **kwargs)

    def create(name: str, tensors: Any, rate: float) -> Any:
        kept.extend(tensors)
        return optimiser(name, kept, rate)

    def patch(module: torch.nn.Module, offloading: bool = False) -> None:
        forward = module.forward

        def again(*args: Any, **kwargs: Any) -> Any:  # what is run once more for its gradient runs outside of modes
            with Autocast("meta", torch.bfloat16):
                return forward(*args, **kwargs)

        module.forward = again
        checkpoint(module, offloading=offloading)

    class Guider(trainer.TrainGuider):
        outer_sample = counting.MetaGuider.outer_sample

    changes: dict[str, Callable] = {"_setup_lora_adapters": setup, "_create_optimizer": create, "patch": patch}
    with contextlib.ExitStack() as stack:
        for name, change in (changes | {"TrainGuider": Guider}).items():
            stack.enter_context(mock.patch.object(trainer, name, change))
        stack.enter_context(mock.patch.object(torch, "autocast", Autocast))
        stack.enter_context(mock.patch.object(comfy.model_management, "load_models_gpu", lambda *_, **__: None))
        yield


def trained(family: counting.Family, name: str, steps: int, watched: bool = False) -> Run:
    """A training of so many steps. watched: its peak is what is counted."""
    trainer, _ = host_trainer()
    model, second, tensors = counting.build(family), counting.build(family), []
    model.cached_patcher_init = (lambda *_, **__: second, ())  # it trains in a model that is loaded once more
    inputs = trainer.TrainLoraNode.define_schema().inputs
    given = {entry.id: [entry.default] for entry in inputs if hasattr(entry, "default")}
    given |= {"model": [model], "latents": [{"samples": family.latent()}], "positive": [family.prompt()]}
    given |= {"steps": [steps], "rank": [RANK], "batch_size": [1]}
    given |= {key: [value] for key, value in TAUGHT[name].items()}
    weights = torch.nn.ModuleList([model.model, second.model])
    counter = Memory(weights) if watched else counting.counting(weights)
    with torch.inference_mode(), counting.meta_host(), on_meta(trainer, model, tensors), counter as found:
        trainer.TrainLoraNode.execute(**given)
    return Run(found.cost, found.peak if watched else 0, tensors)


def step(family: counting.Family, name: str) -> counting.Cost:
    """One step: what two take more than one. What autograd keeps is that of one."""
    one, two = (trained(family, name, steps).cost for steps in (1, 2))
    return replace(two - one, saved=one.saved)


# ---- ours beside it -------------------------------------------------------------------------------------------------

# (Train LoRA, the host's trainer): what is compared. With convolutions ours learns in the same blocks as the host's.
PAIRS = [
    ("rank 32", "rank 32"),
    ("rank 32, checkpointing", "rank 32, checkpointing"),
    ("rank 32, checkpointing", "rank 32, checkpointing, depth 2"),
    ("rank 32, convolutions too", "rank 32"),
]
CHECKPOINTED = "rank 32, checkpointing"
COPIES = 4  # of every number that learns: itself, its gradient, and the two of AdamW's state


def ours(name: str) -> str:
    """Train LoRA in a way, as lines call it."""
    return f"Train LoRA, {name}"


def theirs(name: str) -> str:
    """The host's trainer in a way, as lines and calls call it."""
    return f"the host's trainer, {name}"


def steps(family: counting.Family) -> dict[str, counting.Cost]:
    """A step of the host's trainer in every way; none where the host has no such trainer, which is then said."""
    trainer, missing = host_trainer()
    if trainer is None:
        print(f"The host's own trainer is left out: {missing}.")
        return {}
    return {theirs(name): step(family, name) for name in TAUGHT}


def size(tensors: list[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compared(calls: dict[str, counting.Cost]) -> list[dict]:
    """Lines of a step of Train LoRA to one of the host's trainer."""
    lines = []
    for name, other in PAIRS:
        if theirs(other) not in calls:
            continue
        one, its = calls[name], calls[theirs(other)]
        ratios = {"FLOP": one.flops / its.flops, "roof": max(one.h200 / its.h200, one.rtx4090 / its.rtx4090)}
        if "checkpointing" not in name:
            ratios["kept for the gradient"] = one.saved / its.saved
        lines += [
            {"": f"{ours(name)}, to {theirs(other)}: {what}", "ratio": ratio, "goal": 1.0}
            for what, ratio in ratios.items()
        ]
    return lines


def of_memory(model: Any, family: counting.Family, calls: dict[str, counting.Cost]) -> list[dict]:
    """Lines of what learns, and of the most memory beside the weights, to plain sampling's and to the host's."""
    with Memory(model.model) as plain:
        counting.sampling_step(model, family, 7.5)
    learning = {ours(name): counting_lora.learning(model, name) for name in counting_lora.TAUGHT}
    peaks = {ours(name): counting_lora.peak(model, family, name) for name in counting_lora.TAUGHT}
    if any(theirs(name) in calls for name in TAUGHT):
        runs = {theirs(name): trained(family, name, 2, watched=True) for name in TAUGHT}
        learning |= {name: run.tensors for name, run in runs.items()}
        peaks |= {name: run.peak for name, run in runs.items()}
    lines = [
        {
            "": f"{name}: {sum(tensor.numel() for tensor in tensors):,} numbers, their gradient and AdamW's state",
            "GB": COPIES * size(tensors) / 1e9,
        }
        for name, tensors in learning.items()
        if "checkpointing" not in name
    ]
    lines += [
        {"": f"{name}: peak beside the weights", "GB": peak / 1e9, "ratio": peak / plain.peak}
        for name, peak in ({"a plain step": plain.peak} | peaks).items()
    ]
    return lines + to_goals(plain.peak, peaks, size(learning[ours(CHECKPOINTED)]), calls[CHECKPOINTED].saved)


def to_goals(plain: int, peaks: dict[str, int], factors: int, kept: float) -> list[dict]:
    """Lines of peaks to what they are to stay below. kept: bytes for the gradient with checkpointing."""
    lines = []
    for copies, what in ((1, "factors"), (COPIES + 1, "factors, their gradient, AdamW's state, the last good ones")):
        limit = plain + copies * factors + kept
        name = f"{ours(CHECKPOINTED)}: peak to that of a plain step + kept for the gradient + {what}"
        lines.append({"": name, "GB": limit / 1e9, "ratio": peaks[ours(CHECKPOINTED)] / limit, "goal": 1.0})
    return lines + [
        {"": f"{ours(name)}, to {theirs(other)}: peak", "ratio": peaks[ours(name)] / peaks[theirs(other)], "goal": 1.0}
        for name, other in PAIRS
        if theirs(other) in peaks
    ]
