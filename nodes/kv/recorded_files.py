"""A transformer's record on disk: the source's path and prompt, from which a pass a step makes keys and values again.

Keys and values themselves take 0.6 to 1.8 GB a step at full size; the path of 30 steps is 33 MB at 1024 px.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .. import host, inversion
from ..headers import Header, Tensors, typed
from ..quoting import quoted
from .embeddings import KVEmbeddings
from .modes import served
from .recorded import RecordedKV

KIND = "path"  # in the header: that it is one of these
TEXT, PATH, NOISE = "text", "latents", "noise"
WHOLE_NUMBERS = ("I64", "I32", "BOOL", "U8")  # of token ids and masks beside a prompt
PLAIN = (bool, int, float, str, type(None))
MOST_PARTS = 64  # of a prompt, and pictures beside one


def tensors_of(kv: RecordedKV) -> dict[str, Tensor]:
    """What a file holds; copies, for a file refuses two names for one piece of memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in held_by(kv).items()}


def held_by(kv: RecordedKV) -> dict[str, Tensor]:
    """The tensors of a record, by their names in a file."""
    found = {PATH: kv.trajectory.latents, NOISE: kv.noise}
    for i, (text, extra) in enumerate(kv.prompt):
        found[f"{TEXT}.{i}"] = text
        found |= {f"{TEXT}.{i}.{name}": value for name, value in extra.items() if isinstance(value, Tensor)}
        lists = {name: value for name, value in extra.items() if is_tensors(value)}
        found |= {f"{TEXT}.{i}.{name}.{j}": t for name, value in lists.items() for j, t in enumerate(value)}
    return found


def header_of(kv: RecordedKV) -> dict[str, str]:
    """The header of a file."""
    trajectory = kv.trajectory
    return {
        "kind": KIND,
        "family": kv.family,
        "layout": kv.layout,
        "sigmas": json.dumps(trajectory.sigmas),
        "levels": json.dumps(kv.levels),
        "layers": json.dumps([[block, number] for block, number, _ in kv.layers]),
        "prompt": json.dumps([described(extra) for _, extra in kv.prompt]),
        "fingerprint": trajectory.prompt,
        "guidance": json.dumps([trajectory.guidance]),
        "path": json.dumps([trajectory.flow, trajectory.contextual]),
    }


def is_tensors(value: Any) -> bool:
    """Whether it is a list of tensors, as reference latents are."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, Tensor) for each in value)


def described(extra: dict[str, Any]) -> dict[str, Any]:
    """What stands beside a prompt's text, without its tensors; of a list of them, how many. Raises ValueError."""
    found = {}
    for name, value in extra.items():
        if is_tensors(value):
            found[name] = [len(value)]
        elif not isinstance(value, Tensor):
            found[name] = value
    odd = next((name for name, value in found.items() if not isinstance(value, (*PLAIN, list))), None)
    if odd is not None:
        raise ValueError(
            f"the source's prompt carries {quoted(odd)}, which a file cannot hold: keep Tune KV in the workflow, or "
            "record with a prompt without it."
        )
    return found


def recorded_from(header: Header, tensors: Tensors, others: Collection[str] = ()) -> RecordedKV:
    """A record from a file's header and tensors; raises ValueError where one is nonsense or both disagree.

    others: the tensors that belong to what was learned beside it.
    """
    sigmas, levels = header.numbers("sigmas"), header.numbers("levels")
    if not levels or not set(levels) <= set(sigmas[:-1]):
        raise ValueError("its levels are not those of its sigmas")
    flow, contextual = (typed("path", value, bool) for value in header.json("path", list))
    tensors.require(PATH, len(sigmas), None, None, None, None, kinds=("F32",))
    shape = tensors.shapes[PATH][1:]
    pictures, channels, height, width = shape
    clip = len(tensors.shapes.get(NOISE, ())) == 5  # of a model for clips, a picture is one frame
    tensors.require(NOISE, pictures, channels, *((1,) if clip else ()), height, width)
    prompt = prompt_from(header, tensors, others)
    path = tensors[PATH]
    trajectory = host.Trajectory(
        sigmas=sigmas,
        latents=path,
        guidance=header.numbers("guidance", count=1)[0],
        prompt=header.text("fingerprint"),
        layout=header.text("layout"),
        flow=flow,
        contextual=contextual,
    )
    trajectory.require_sound()
    noise = tensors[NOISE]
    if not (torch.isfinite(path).all() and torch.isfinite(noise).all()):
        raise ValueError("its latents hold NaN or infinite values")
    family = header.text("family")
    said = "recorded again from its file by Apply KV"
    return RecordedKV(
        trajectory, layers_from(header), levels, family, source=None, said=said, prompt=prompt, noise=noise
    )


def layers_from(header: Header) -> tuple[host.LayerKey, ...]:
    """The recorded layers. Raises ValueError for none, and for what names none."""
    found = []
    for value in header.json("layers", list):
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"its layers should be pairs of a name and a number, one is {quoted(value)}")
        found.append((typed("layer", value[0], str), typed("layer", value[1], int, 0, 999), 0))
    if not found or len(set(found)) != len(found):
        raise ValueError(f"its {len(found)} layers should be one or more, each once")
    return tuple(found)


def prompt_from(header: Header, tensors: Tensors, others: Collection[str]) -> list:
    """The source's CONDITIONING. Raises ValueError for tensors that the header does not name, and NaN."""
    told = header.json("prompt", list)
    if not 0 < len(told) <= MOST_PARTS:
        raise ValueError(f"its prompt should have 1 to {MOST_PARTS} parts, it has {len(told)}")
    known, found = {PATH, NOISE, *others}, []
    for i, value in enumerate(told):
        tensors.require(f"{TEXT}.{i}", None, None, None)
        extra = plain_values(typed("prompt", value, dict))
        lists = {name: given for name, given in extra.items() if isinstance(given, list)}
        prefix = f"{TEXT}.{i}."
        listed = {f"{prefix}{name}.{j}" for name, (count,) in lists.items() for j in range(count)}
        beside = {name for name in tensors.shapes if name.startswith(prefix)} - listed
        known |= {f"{TEXT}.{i}", *listed, *beside}
        extra |= {name: [tensors[f"{prefix}{name}.{j}"] for j in range(count)] for name, (count,) in lists.items()}
        extra |= {name.removeprefix(prefix): tensors[name] for name in sorted(beside)}
        found.append([tensors[f"{TEXT}.{i}"], extra])
    tensors.refuse_others(known)
    require_finite(found, tensors)
    return found


def plain_values(told: dict) -> dict[str, Any]:
    """What stands beside a text without tensors: numbers, words, and how many tensors a list has."""
    for name, value in told.items():
        if isinstance(value, list):
            if len(value) != 1 or not 0 < typed(name, value[0], int) <= MOST_PARTS:
                raise ValueError(f"its prompt's {quoted(name)} should say how many tensors it has")
        elif not isinstance(value, PLAIN) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"its prompt's {quoted(name)} should be a number or a text, it is {quoted(value)}")
    return dict(told)


def require_finite(prompt: list, tensors: Tensors) -> None:
    """Raise ValueError for NaN, infinite values, and numbers of a kind that no prompt has."""
    odd = next(
        (name for name, kind in tensors.kinds.items() if kind not in ("F16", "BF16", "F32", *WHOLE_NUMBERS)), None
    )
    if odd is not None:
        raise ValueError(f"its {quoted(odd)} holds {tensors.kinds[odd]} numbers, which no prompt has")
    parts = itertools.chain.from_iterable([text, *extra.values()] for text, extra in prompt)
    flat = itertools.chain.from_iterable(part if isinstance(part, list) else [part] for part in parts)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in flat if isinstance(tensor, Tensor)):
        raise ValueError("its prompt holds NaN or infinite values")


def describe_recorded(kv: RecordedKV) -> str:
    """One line on what a record's file holds."""
    height, width = kv.trajectory.latents.shape[-2:]
    size = sum(tensor.nbytes for tensor in held_by(kv).values())
    learned = "" if kv.learned is None else f"; {learned_in_words(kv.learned)}"
    return (
        f"{kv.family}: the path and the prompt of {kv.pictures} picture(s), latents of {width} x {height}, "
        f"{kv.trajectory.steps} steps, {len(kv.layers)} layers at {len(kv.levels)} levels, {size / 1e6:.1f} MB; keys "
        f"and values are recorded again by Apply KV{learned}; modes {', '.join(served(kv))}"
    )


def learned_in_words(kv: KVEmbeddings) -> str:
    """What was learned beside a record."""
    error = f", {inversion.error_in_words(kv.info)}" if "latent_rmse" in kv.info else ""
    return f"learned in {len(kv.layers)} layers at rank {kv.rank}, {kv.bytes / 1e6:.1f} MB{error}"
