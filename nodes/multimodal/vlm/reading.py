"""Models read by transformers: offline, bounded before they are built, stopped when cancelled, errors with a cause."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...host.cancelling import Cancellable

OFFLINE = {"local_files_only": True, "trust_remote_code": False}  # for every from_pretrained
COPY_AGAIN = "copy the model's folder again"
LONGEST = 300  # letters of what transformers says that are passed on
MAKERS = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})  # of weights
SLACK = 1 << 20  # numbers of a model that stand in no file: tables that it calculates


class Refused(ValueError):
    """A sentence of our own about a folder, which is passed on as it is."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Within it, transformers reads a folder: what it cannot read becomes a ValueError that says why.

    A cancelled run, and memory that runs out, go on to the host as they are.
    """
    import comfy.model_management as management

    passed = (Refused, MemoryError, management.OOM_EXCEPTION, management.InterruptProcessingException)
    try:
        with Cancellable():
            yield
    except passed:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise any kind, Exception itself for one
        raise ValueError(f"{name} cannot be read: {cause_of(error)}") from error


def cause_of(error: Exception) -> str:
    """What went wrong and what helps: the folder is to blame only where it is."""
    import transformers
    from safetensors import SafetensorError

    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[0].strip().rstrip(".")[:LONGEST]
    if isinstance(error, SafetensorError):
        return f"its weights are cut off or damaged ({said}). Copy the model's folder again."
    if isinstance(error, RecursionError):
        return f"a file of its tokenizer is nested too deep. {COPY_AGAIN.capitalize()}."
    if isinstance(error, ImportError):
        return f"a Python package is missing here ({said}). Install it beside ComfyUI."
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}. Let ComfyUI read the folder, and make room where the disk is full."
    return (
        f"transformers {transformers.__version__} says: {said}. Compare config.json and the tokenizer's files with the "
        "published ones, or update transformers."
    )


class Measured(Cancellable):
    """Within it, weights are made without memory, and only as many numbers as some files have bytes."""

    def __init__(self, name: str, room: int):
        super().__init__()
        self.name, self.room, self.left = name, room, room + SLACK

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in MAKERS:
            return super().__torch_function__(function, types, args, kwargs)
        made = super().__torch_function__(function, types, args, (kwargs or {}) | {"device": "meta"})
        self.left -= made.numel()
        if self.left < 0:
            raise Refused(
                f"config.json of {self.name} describes a model of more weights than its {self.room / 1e6:.1f} MB of "
                f".safetensors can hold: {COPY_AGAIN}."
            )
        return made


def read_model(
    name: str,
    folder: Path,
    files: Sequence[Path],
    config: Any,
    make: Callable[[Any], nn.Module],
    load: Callable[..., Any],
    **options: Any,
) -> nn.Module:
    """The model of a folder, whose weights lie in `files`. Raises ValueError for incomplete weights, and as reading.

    make(config) builds one without weights, load(folder, config=..., ...) one with them, as from_pretrained does.
    """
    with reading(name):
        with Measured(name, sum(file.stat().st_size for file in files)):
            make(copy.deepcopy(config))
        model, info = load(folder, config=config, use_safetensors=True, output_loading_info=True, **OFFLINE | options)
    lacking = sorted(info["missing_keys"])
    if lacking or info.get("mismatched_keys"):
        odd = lacking or sorted(map(str, info["mismatched_keys"]))
        raise ValueError(
            f"{name} is incomplete, {len(odd)} of its weights are missing or of another shape, {odd[0]} for one: "
            f"{COPY_AGAIN}."
        )
    return model


class Held(nn.Module):
    """A model of transformers where the host's patcher expects a module whose `device` it may note on it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


def managed(model: nn.Module) -> Any:
    """A frozen model under the host's memory management, as text encoders are; it is the patcher's model.model."""
    import comfy.model_management
    import comfy.model_patcher

    return comfy.model_patcher.CoreModelPatcher(
        Held(model.eval().requires_grad_(False)),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
