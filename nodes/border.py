"""What comes into a node and what goes out of it, looked at in one place: `guarded` wraps every node of the pack.

The host compares numbers with their least and most value, which NaN passes, and only where they were typed; it looks
into no tensor. Here every value is of its kind, finite and of a shape that the nodes know, or is refused in a sentence
before anything runs. A value is read once when a node executes, on its device; large objects of ours once for all.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from . import host
from .quoting import quoted

LOOK_BEFORE = "look at the node before it"
LEAST_LATENT = 4  # cells a side: a U-Net halves the grid several times
LOUDEST = 1e9  # of a prompt: language models reach some ten thousands
LARGEST = 1e9  # of numbers whose sockets name no bounds
BRIGHTEST = 1e5  # of a picture: more than half precision holds, for pictures of high dynamic range
LETTERS = 1_000_000  # of a text: a caption for each of ten thousand pictures
LETTERS_OF_A_PROMPT = 10_000  # thirty times what CLIP encodes at once; two prompts are compared word by word
BRACKETS = 100  # within one another: the host reads a prompt's weights by recursion
KINDS_OF_NUMBER = {"INT": (int, "a whole number"), "FLOAT": (float, "a number")}
NOT_FINITE = (
    "{} came out with NaN or infinite values: run the model in another precision (start ComfyUI with --bf16-unet or "
    "--fp32-unet), or look at the picture, the prompt and the numbers of this node."
)


# ---- one value of each kind -----------------------------------------------------------------------------------------


def tensor_of(value: Any, name: str, what: str, *, dimensions: tuple[int, ...]) -> Tensor:
    """A tensor of floats with as many dimensions and without NaN. Whole numbers become floats, bytes 0 to 1."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {quoted(value)} and no tensor, {what}: {LOOK_BEFORE}.")
    if value.ndim not in dimensions:
        raise ValueError(f"{name} has {value.ndim} dimensions {tuple(value.shape)}, {what}: {LOOK_BEFORE}.")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty, of shape {tuple(value.shape)}: {LOOK_BEFORE}.")
    if value.dtype == torch.uint8:
        value = value.float() / (255 if int(value.max()) > 1 else 1)
    if value.is_complex():
        raise ValueError(f"{name} holds complex numbers: {LOOK_BEFORE}.")
    if not value.is_floating_point():
        value = value.float()
    if not host.is_finite(value):
        raise ValueError(f"{name} holds NaN or infinite values: {LOOK_BEFORE}; half precision is a frequent cause.")
    return value


def picture(value: Any, name: str) -> Tensor:
    """An IMAGE (B, H, W, 3 or 4): one picture gets its batch, grey becomes three channels, grey and alpha four."""
    what = "an IMAGE has four (pictures, height, width, channels)"
    image = tensor_of(value, name, what, dimensions=(3, 4))
    image = image if image.ndim == 4 else image[None]
    channels = image.shape[-1]
    if channels > 4:
        raise ValueError(f"{name} has {channels} channels, a picture has 3, or 4 with alpha: {LOOK_BEFORE}.")
    if max(map(abs, map(float, torch.aminmax(image)))) > BRIGHTEST:
        raise ValueError(f"{name} has values beyond {BRIGHTEST:g}, a picture goes from 0 to 1: {LOOK_BEFORE}.")
    if channels > 2:
        return image
    return torch.cat([image[..., :1].expand(-1, -1, -1, 3), image[..., 1:]], -1)


def mask(value: Any, name: str) -> Tensor:
    """A MASK (B, H, W): a single one gets its batch, an axis of one channel goes."""
    found = tensor_of(value, name, "a MASK has three (masks, height, width)", dimensions=(2, 3, 4))
    if found.ndim == 4 and 1 in (found.shape[1], found.shape[-1]):
        found = found.squeeze(1 if found.shape[1] == 1 else -1)
    if found.ndim == 4:
        raise ValueError(
            f"{name} has the shape {tuple(found.shape)}, a MASK has three dimensions (masks, height, width): "
            f"{LOOK_BEFORE}."
        )
    return found if found.ndim == 3 else found[None]


def latent(value: Any, name: str) -> dict:
    """A LATENT: a dictionary with samples of a size that a network can take."""
    if not isinstance(value, Mapping) or value.get("samples") is None:
        raise ValueError(f"{name} holds no samples: connect a LATENT, as VAE Encode gives it.")
    what = "a LATENT has four (pictures, channels, height, width)"
    samples = tensor_of(value["samples"], name, what, dimensions=(4, 5))
    height, width = samples.shape[-2:]
    if min(height, width) < LEAST_LATENT:
        raise ValueError(
            f"{name} is a latent of {width} x {height} ({width * 8} x {height * 8} pixels): take a picture of at least "
            f"{LEAST_LATENT * 8} pixels a side."
        )
    return {**value, "samples": samples}


def conditioning(value: Any, name: str) -> list:
    """A CONDITIONING of at least one prompt, tokens (B, L, D), with finite numbers beside them."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{name} holds no prompt: connect CLIP Text Encode.")
    return [prompt(part, name) for part in value]


def prompt(value: Any, name: str) -> list:
    """One prompt of a CONDITIONING."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not isinstance(value[1], Mapping):
        raise ValueError(f"{name} holds {quoted(value)}, which is no prompt: connect CLIP Text Encode.")
    tokens, extra = value
    if isinstance(tokens, Tensor):
        tokens = tensor_of(tokens, name, "a prompt has three (batch, tokens, channels)", dimensions=(3,))
        if tokens.numel() and (most := tokens.abs().max().item()) > LOUDEST:
            raise ValueError(f"{name} holds numbers up to {most:.0e}, which no text encoder writes: {LOOK_BEFORE}.")
    for key, beside in extra.items():
        if not (host.is_finite(beside) if isinstance(beside, Tensor) else is_finite_number(beside)):
            raise ValueError(f"{name} has a {key} with NaN or infinite values: {LOOK_BEFORE}.")
    return [tokens, extra]


def is_finite_number(value: Any) -> bool:
    """Whether something is no number, or a finite one."""
    return not isinstance(value, float) or math.isfinite(value)


def sigmas(value: Any, name: str) -> Tensor:
    """SIGMAS (T+1,): finite noise levels, none below 0. A node says itself how many it needs."""
    if isinstance(value, Tensor) and value.shape == (0,):
        return value
    levels = tensor_of(value, name, "SIGMAS have one", dimensions=(1,))
    if float(levels.min()) < 0:
        raise ValueError(f"{name} goes down to {float(levels.min()):.4g}, a noise level is 0 or more: {LOOK_BEFORE}.")
    return levels


def number(value: Any, name: str, socket: Any) -> int | float:
    """A finite number within the input's bounds, which the host checks only where it was typed."""
    make, what = KINDS_OF_NUMBER[socket.io_type]
    least, most = getattr(socket, "min", -LARGEST), getattr(socket, "max", LARGEST)  # a bare socket has none
    counts = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not counts or make(value) != value or not least <= value <= most:
        raise ValueError(f"{name} is {quoted(value)}: give it {what} from {least:g} to {most:g}.")
    return make(value)


def text(value: Any, name: str, socket: Any) -> str:
    """A text that text encoders and files can take; prompts are those that say whether they are dynamic."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {quoted(value)}, which is no text: {LOOK_BEFORE}.")
    most = LETTERS if getattr(socket, "dynamic_prompts", None) is None else LETTERS_OF_A_PROMPT
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} letters, at most {most} are read: shorten it.")
    if most == LETTERS_OF_A_PROMPT and nested(value) > BRACKETS:
        raise ValueError(f"{name} has more than {BRACKETS} brackets within one another: take some out.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} is {quoted(value)}, which holds half a character: type or copy it again.")
    return value


def nested(prompt: str) -> int:
    """How many opening brackets stand before what they would close, at most."""
    steps = [1 if letter == "(" else -1 for letter in prompt if letter in "()"]
    return max(itertools.accumulate(steps), default=0)


LISTED = {
    "file",
    "folder",
    "connector",
    "lora",
    "detector",
    "resume",
    "font",
    "embeddings",
}  # the nodes say themselves what is on the disk
SIDES = ("x", "y", "width", "height")


def boxes(value: Any, name: str) -> Any:
    """Boxes in pixels, in lists within lists as nodes give them: x, y, width and height are finite numbers."""
    if isinstance(value, list | tuple):
        return [boxes(each, name) for each in value]
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} holds {quoted(value)}, which is no box: {LOOK_BEFORE}.")
    for side in (*SIDES, *({"score"} & value.keys())):
        number = value.get(side)
        if not isinstance(number, Real) or not math.isfinite(number):
            raise ValueError(f"{name} has a box whose {side} is {quoted(number)}: {LOOK_BEFORE}.")
    return value


def choice(value: Any, name: str, socket: Any) -> Any:
    """One of the options of an input, which the host checks only where it was typed."""
    options = list(socket.options or ())
    if options and value not in options and name not in LISTED:
        raise ValueError(f"{name} is {quoted(value)}: choose one of {quoted(', '.join(map(str, options)))}.")
    return value


SOUND: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # objects of ours that were looked at


def object_of_ours(value: Any, name: str) -> Any:
    """What a socket of ours carries, all of its tensors and levels finite; each object is looked at once."""
    if SOUND.get(id(value)) is value:
        return value
    if not is_dataclass(value):
        raise ValueError(f"{name} is {quoted(value)}, which no node of this pack made: {LOOK_BEFORE}.")
    if hasattr(value, "require_sound"):
        value.require_sound()
    for what, part in parts_of(value):
        if not (host.is_finite(part) if isinstance(part, Tensor) else is_finite_number(part)):
            raise ValueError(f"{name} holds NaN or infinite values ({what}): make it again.")
        if isinstance(part, Tensor) and part.numel() == 0:
            raise ValueError(f"{name} is empty ({what} of shape {tuple(part.shape)}): make it again.")
    SOUND[id(value)] = value
    return value


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor or number) of every field of an object, and of every part of those that are tuples."""
    for each in fields(value) if is_dataclass(value) else ():
        held = getattr(value, each.name)
        yield from ((each.name, part) for part in (held if isinstance(held, tuple) else (held,)))


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "IMAGE": picture,
    "MASK": mask,
    "LATENT": latent,
    "CONDITIONING": conditioning,
    "SIGMAS": sigmas,
    "BOUNDING_BOX": boxes,
    "PALIMPSEST_TRAJECTORY": object_of_ours,
    "PALIMPSEST_KV": object_of_ours,
    "PALIMPSEST_TOKENS": object_of_ours,
    "PALIMPSEST_BLEND_WEIGHTS": object_of_ours,
    "PALIMPSEST_TEXT_LINES": object_of_ours,
    "PALIMPSEST_TEXT_EMBEDDER": object_of_ours,
    "PALIMPSEST_EDIT_HEAD": object_of_ours,
}
CHECKS_BY_SOCKET: dict[str, Callable[[Any, str, Any], Any]] = {
    "INT": number,
    "FLOAT": number,
    "COMBO": choice,
    "STRING": text,
}


# ---- all values of a node -------------------------------------------------------------------------------------------


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node with its border: its inputs are looked at before it runs, its outputs after."""

    @functools.wraps(node.execute.__func__)
    def execute(cls: type, **given: Any) -> io.NodeOutput:
        schema = node.define_schema()
        returned = node.execute.__func__(cls, **incoming(schema, given))
        outgoing(schema, getattr(returned, "args", returned))
        return returned

    made = {"execute": classmethod(execute), "__module__": node.__module__, "__doc__": node.__doc__}
    return type(node)(node.__name__, (node,), made)


def incoming(schema: io.Schema, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a node as it may have them. Raises ValueError with a sentence."""
    sockets = {socket.id: socket for socket in schema.inputs}
    looked = {
        name: looked_at(value, name, sockets[name], listed=schema.is_input_list) if name in sockets else value
        for name, value in given.items()
    }
    fitting(sockets, {name: first_of(value) for name, value in looked.items()} if schema.is_input_list else looked)
    return looked


def first_of(value: Any) -> Any:
    """The first of the values that the host gives as a list."""
    return value[0] if isinstance(value, list) and value else value


def looked_at(value: Any, name: str, socket: Any, *, listed: bool = False) -> Any:
    """One input; each of its values where the host gives lists or a growing number of them."""
    if isinstance(socket, io.Autogrow.Input):
        inner = socket.template.input
        return {key: looked_at(each, key, inner, listed=listed) for key, each in (value or {}).items()}
    if listed and isinstance(value, list):
        given = [each for each in value if each is not None or not socket.optional]
        return [looked_at(each, name, socket) for each in given] or None
    if value is None and socket.optional:
        return None
    if value is None:
        raise ValueError(
            f"{name} is empty: this checkpoint holds no text encoder; connect one (Load CLIP)."
            if socket.io_type == "CLIP"
            else f"{name} is empty: what is connected gives nothing, {LOOK_BEFORE}."
        )
    if socket.io_type in CHECKS_BY_SOCKET:
        return CHECKS_BY_SOCKET[socket.io_type](value, name, socket)
    return CHECKS.get(socket.io_type, lambda value, _: value)(value, name)


def fitting(sockets: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError for a latent or prompt that the connected model cannot read, or that lies beside the picture."""
    model, latents, trajectory = given.get("model"), latents_of(given), given.get("trajectory")
    if model is not None:
        if not host.is_unet(model) or (trajectory is not None and not host.same_layout(model, trajectory.layout)):
            return  # the nodes say so themselves, by their names
        if latents is not None:
            host.require_channels(model, latents)
    for name, value in given.items():
        kind = sockets[name].io_type if name in sockets and value is not None else ""
        if kind == "PALIMPSEST_TOKENS" and model is not None:
            host.require_width(model, value.prompt, name)
        elif kind == "CONDITIONING":
            if model is not None:
                host.require_readable(model, value, name)
            if latents is not None:
                host.require_inside(value, tuple(latents.shape[-2:]), name)


def latents_of(given: Mapping[str, Any]) -> Tensor | None:
    """The pictures (..., C, H, W) that a node works on, where it is given some."""
    if given.get("latent") is not None:
        return given["latent"]["samples"]
    trajectory = given.get("trajectory")
    return None if trajectory is None else trajectory.latents[0]


def outgoing(schema: io.Schema, outputs: tuple) -> None:
    """Raise ValueError where a picture, latent, mask or object of ours that a node gives is not finite."""
    for socket, value in zip(schema.outputs, outputs, strict=False):
        name = socket.display_name or socket.id
        if socket.io_type in OURS:
            sound = all(host.is_finite(part) for _, part in parts_of(value) if isinstance(part, Tensor))
            if sound and is_dataclass(value):
                SOUND[id(value)] = value
        else:
            sound = all(host.is_finite(tensor) for tensor in tensors_of(value))
        if not sound:
            raise ValueError(NOT_FINITE.format(name))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an IMAGE, a MASK, a LATENT or a CONDITIONING; none of anything else."""
    if isinstance(value, Mapping):
        found = [value.get("samples")]
    elif isinstance(value, list):
        found = [each[0] for each in value if isinstance(each, list | tuple) and each]
    else:
        found = [value]
    return [each for each in found if isinstance(each, Tensor)]


OURS = frozenset(kind for kind in CHECKS if kind.startswith("PALIMPSEST_"))
