"""Graphs in the host's own executor, in this process, and what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy_extras.nodes_custom_sampler as custom_sampler
import execution
import folder_paths
import tiny_mgie
import tiny_vlm
import torch
from palimpsest.nodes.extension import Palimpsest, register_folders
from text_control import teaching, writing

import nodes

from . import values

PACK = Path(__file__).resolve().parents[2]
SHIPPED = tuple(str(PACK / part) + os.sep for part in ("nodes", "kernels"))
SENTENCES = ("ValueError", "WrongSize", "OSError", "FileNotFoundError", "RuntimeError", "MemoryError")
TOO_LONG = 10.0  # seconds of a case
SOON = 1.0  # seconds in which what is cancelled has to end
FINE, REFUSED, HOSTS, FOREIGN, SILENT, SLOW, STOPPED = (
    "fine", "refused by us", "refused by the host", "FOREIGN", "NOT FINITE", "TOO LONG", "stopped"
)  # fmt: skip
FAULTS = (FOREIGN, SILENT, SLOW)


class AnyType(str):
    """A type that fits every socket."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANY = AnyType("*")


class Thing:
    """A good value of values.THINGS; another tick is another value for the host's cache."""

    RETURN_TYPES, FUNCTION, CATEGORY = (ANY,), "run", "fuzz"
    MADE: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"name": ("STRING", {})}, "optional": {"tick": ("INT", {"default": 0})}}

    def run(self, name: str, tick: int = 0) -> tuple:
        if name not in self.MADE:
            self.MADE[name] = values.THINGS[name]()
        return (self.MADE[name],)


class OtherModel(Thing):
    """A model of another family."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"family": ("STRING", {})}}

    def run(self, family: str) -> tuple:
        if family not in self.MADE:
            self.MADE[family] = values.model(family)
        return (self.MADE[family],)


class Bad(Thing):
    """What values.BAD makes of a good value."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": (ANY, {}), "socket": ("STRING", {}), "what": ("STRING", {})}}

    def run(self, value: Any, socket: str, what: str) -> tuple:
        return (values.BAD[socket][what](value),)


class Sink(Thing):
    """Keeps what it is given, by its id in the graph."""

    OUTPUT_NODE = True
    SEEN: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": (ANY, {})}, "hidden": {"unique_id": "UNIQUE_ID"}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return math.nan

    def run(self, value: Any, unique_id: str) -> dict:
        self.SEEN[unique_id] = value
        return {"ui": {}, "result": (None,)}


class Listener:
    """What the executor sends its messages to."""

    client_id, last_node_id, last_prompt_id = None, None, None

    def send_sync(self, *_: Any) -> None:
        """Nobody listens."""


@dataclass
class Outcome:
    """What came of a graph. seen: by sink, what reached it."""

    kind: str
    said: str = ""
    seconds: float = 0.0  # of this process's own work, so that a busy machine does not count
    went_on: float = 0.0  # after it was cancelled
    seen: dict[str, Any] = field(default_factory=dict)
    frames: list[str] = field(default_factory=list)

    @property
    def is_fault(self) -> bool:
        return self.kind in FAULTS


# ---- a host of its own ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_folders(base: Path) -> Iterator[None]:
    """The host's folders in an empty base, with one small model of every kind that our loaders list."""
    kept = {name: getattr(folder_paths, name) for name in FOLDERS}
    kept |= {name: dict(getattr(folder_paths, name)) for name in ("folder_names_and_paths", "filename_list_cache")}
    try:
        for name in ("models", "output", "input", "temp", "user"):
            (base / name).mkdir()
        folder_paths.models_dir = str(base / "models")
        for name in ("output", "input", "temp"):
            setattr(folder_paths, f"{name}_directory", str(base / name))
        hosts = {name: base / "models" / name for name in ("loras", "diffusion_models")}  # that our nodes write to
        for folder in hosts.values():
            folder.mkdir()
        own = {name: ([str(folder)], {".safetensors"}) for name, folder in hosts.items()}
        folder_paths.folder_names_and_paths = own
        folder_paths.filename_list_cache = {}
        register_folders()
        tiny_vlm.write(base / "models" / "palimpsest_encoders" / "idefics2", "idefics2")
        teaching.write(base / "input" / "palimpsest_texts" / "fuzz", teaching.RECORDS[:2])
        writing.save_control(base / "models" / "palimpsest_text_control" / "fuzz.safetensors", writing.network())
        tiny_mgie.write(base / "models" / "palimpsest_mgie" / "mgie")
        yield
    finally:
        for name, value in kept.items():
            setattr(folder_paths, name, value)


FOLDERS = ("models_dir", "output_directory", "input_directory", "temp_directory")


def our_nodes() -> dict[str, type]:
    """The pack's nodes by id, as the host registers them, and those that make and take values."""
    ours = {node.GET_SCHEMA().node_id: node for node in asyncio.run(Palimpsest().get_node_list())}
    hosts = {node.GET_SCHEMA().node_id: node for node in (custom_sampler.BasicScheduler, custom_sampler.SamplerCustom)}
    return ours | hosts | {"FuzzThing": Thing, "FuzzModel": OtherModel, "FuzzBad": Bad, "FuzzSink": Sink}


def info_of(classes: dict[str, type]) -> dict[str, dict]:
    """What /object_info tells of nodes."""
    return {
        name: {"input": node.INPUT_TYPES(), "output": list(node.RETURN_TYPES)}
        for name, node in classes.items()
        if name.startswith("Palimpsest")
    }


class Runner:
    """The host's executor, with its cache, and our nodes, which the host knows until `close`."""

    def __init__(self) -> None:
        self.classes = our_nodes()
        self.known = dict(nodes.NODE_CLASS_MAPPINGS)
        nodes.NODE_CLASS_MAPPINGS.update(self.classes)
        limits = {"lru": 60, "ram": 0, "ram_inactive": 0}
        self.executor = execution.PromptExecutor(Listener(), execution.CacheType.LRU, limits)

    def close(self) -> None:
        """Let the host know the nodes that it knew before."""
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(self.known)

    def keep_files(self) -> None:
        """A file for each loader, by the pack's own Save nodes."""
        import palimpsest.nodes.multimodal.files as multimodal_files
        from palimpsest.nodes.multimodal.vlm import load_vlm

        vlm = load_vlm(Path(folder_paths.models_dir) / "palimpsest_encoders" / "idefics2", "float32", False)
        path = multimodal_files.new_path("fuzz")
        multimodal_files.save_connector(tiny_vlm.connector(vlm), path)
        path.rename(path.with_name("fuzz.safetensors"))

    def run(self, graph: dict, limit: float = 60.0) -> Outcome:
        """Queue a graph as the host does: validate, execute. It is cancelled after `limit` seconds by the clock."""
        began, name, stopped = time.process_time(), uuid.uuid4().hex, []
        Sink.SEEN.clear()
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt(name, graph, None))
        if not valid or node_errors:
            return Outcome(HOSTS, f"{error} {node_errors}"[:300], time.process_time() - began)

        def cancel() -> None:
            stopped.append(time.process_time())
            comfy.model_management.interrupt_current_processing()

        timer = threading.Timer(limit, cancel)
        timer.start()
        try:
            self.executor.execute(graph, name, {}, outputs)
        finally:
            timer.cancel()
            comfy.model_management.interrupt_current_processing(False)
        ended = time.process_time()
        found = self.outcome(ended - began, tells_nan=any(map(is_text_with_nan, values_of(graph))))
        found.went_on = ended - stopped[0] if stopped else 0.0
        return replace(found, kind=SLOW) if found.seconds > TOO_LONG and not stopped else found

    def outcome(self, seconds: float, tells_nan: bool = False) -> Outcome:
        """What the executor says of its last run; tells_nan: a text of its own graph has the word."""
        last, told = self.executor.status_messages[-1]
        if self.executor.success:
            seen = dict(Sink.SEEN)
            looked = {name: value for name, value in seen.items() if not (tells_nan and isinstance(value, str | list))}
            odd = [f"{name}: {what}" for name, value in looked.items() for what in not_finite(value)]
            return Outcome(SILENT if odd else FINE, "; ".join(odd), seconds, seen)
        if last == "execution_interrupted":
            return Outcome(STOPPED, "", seconds)
        kind, said, frames = told["exception_type"], told["exception_message"], told["traceback"]
        ours = is_ours(kind, frames) or is_the_hosts(frames)
        return Outcome(REFUSED if ours else FOREIGN, f"{kind}: {said}", seconds, frames=frames)


def is_ours(kind: str, frames: list[str]) -> bool:
    """Whether an error is a sentence of ours: raised by a `raise` in the pack, of a kind that carries a sentence."""
    place, code, *_ = [*frames[-1].strip().splitlines(), "", ""]
    path = re.match(r'File "(.*)", line', place.strip())
    inside = path is not None and os.path.realpath(path[1]).startswith(SHIPPED)
    return inside and code.strip().startswith("raise ") and kind.split(".")[-1] in SENTENCES


def is_the_hosts(frames: list[str]) -> bool:
    """Whether the host's own lookup of a file refused it."""
    return "get_full_path_or_raise" in frames[-1]


def values_of(graph: dict) -> Iterator[Any]:
    """All that a graph's widgets hold."""
    for node in graph.values():
        yield from node["inputs"].values()


def is_text_with_nan(value: Any) -> bool:
    """Whether a widget's text has the word nan among others."""
    return isinstance(value, str) and value.lower() != "nan" and re.search(r"\bnan\b", value) is not None


def not_finite(value: Any, depth: int = 0) -> Iterator[str]:
    """What in a result is NaN or infinite: tensors, and numbers in reports. Single numbers may be (a PSNR of inf)."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not torch.isfinite(value).all():
            yield f"{tuple(value.shape)} has {int((~torch.isfinite(value)).sum())} values that are not finite"
    elif isinstance(value, str):
        if re.search(r"\bnan\b", value):
            yield f"a report says {value[:80]!r}"
    elif depth < 4 and isinstance(value, dict):
        for each in value.values():
            yield from not_finite(each, depth + 1)
    elif depth < 4 and isinstance(value, list | tuple):
        for each in value:
            yield from not_finite(each, depth + 1)
    elif depth < 4 and is_dataclass(value):
        for held in (getattr(value, each.name) for each in fields(value)):
            yield from () if isinstance(held, str) else not_finite(held, depth + 1)  # a text of the graph's own


# ---- what must not change -------------------------------------------------------------------------------------------


class Reads:
    """Files that are opened outside of some folders while it is watching."""

    def __init__(self, allowed: list[Path]):
        roots = [*allowed, PACK, Path(sys.prefix), Path(os.environ["COMFYUI_PATH"]), Path("/proc"), Path("/sys")]
        roots += [Path(path) for path in {os.path.dirname(os.__file__), "/dev", "/usr", "/etc/ssl"}]
        self.allowed = tuple(os.path.realpath(root) + os.sep for root in roots)
        self.outside: list[str] = []
        self.watching = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.watching and event == "open" and isinstance(arguments[0], str | os.PathLike):
            path = os.path.realpath(arguments[0])
            if not path.startswith(self.allowed):
                self.outside.append(path)


def contents(base: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in base.rglob("*") if path.is_file()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No tracebacks on the screen: they are looked at."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
