"""Save and Load nodes, made from what they keep: one place for their inputs, outputs, messages and habits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from . import host, inputs
from .files import Shelf


@dataclass(frozen=True)
class Kept:
    """A kind of thing that has a Save and a Load node.

    name: as display names say it ("KV"); id: as node ids do; socket with its input id; shelf: where the files lie.
    save(thing, path, **extra inputs), load(path) -> thing, describe(thing) -> one line. made_by and used_by: the nodes
    before and behind, in tooltips. filename: the default.
    """

    name: str
    id: str
    category: str
    socket: Any
    input: str
    shelf: Shelf
    save: Callable[..., None]
    load: Callable[[str], Any]
    describe: Callable[[Any], str]
    made_by: str
    used_by: str
    filename: str


@inputs.completed()
def save_schema(kept: Kept, description: str, search_aliases: list[str], more_inputs: tuple = ()) -> io.Schema:
    """The schema of a Save node; more_inputs: inputs behind the file name, which go to `save` by name."""
    return io.Schema(
        node_id=f"PalimpsestSave{kept.id}",
        display_name=f"Save {kept.name}",
        category=kept.category,
        description=description,
        search_aliases=search_aliases,
        inputs=[
            kept.socket.Input(kept.input, tooltip=f"From {kept.made_by}."),
            io.String.Input(
                "filename",
                default=kept.filename,
                tooltip="Name of the file; a number is added. Letters, digits, blanks, dashes and underscores; a "
                "folder as in cats/tom, the date as %date:yyyy-MM-dd% or %year%, %month%, %day%, %hour%, %minute%, "
                "%second%.",
            ),
            *more_inputs,
        ],
        outputs=[io.String.Output(display_name="file", tooltip=f"The name to pick in Load {kept.name}.")],
        hidden=inputs.unique_id(),
        is_output_node=True,
    )


def save(node: Any, kept: Kept, thing: Any, filename: str | None = None, **extra: Any) -> io.NodeOutput:
    """Save under the next free number, and say where. filename None: the default."""
    prefix, path = kept.filename if filename is None else filename, None
    while path is None:
        found = kept.shelf.new_path(prefix)
        with contextlib.suppress(FileExistsError):  # another ComfyUI took this number meanwhile
            kept.save(thing, found, **extra)
            path = found
    name = kept.shelf.name(path)
    return io.NodeOutput(name, ui=host.told(node, f"{name}, {path.stat().st_size / 1e6:.1f} MB", saved=[name]))


def checked(name: str | None, attempt: Callable[[str], Any]) -> bool | str:
    """For a node's validate_inputs: True, or why nothing can be saved under a name, before anything else has run.

    attempt(name) raises OSError or ValueError. name None: it is linked, and so not known yet.
    """
    try:
        if name is not None:
            attempt(name)
    except (OSError, ValueError) as error:
        return str(error)
    return True


@inputs.completed("file")
def load_schema(
    kept: Kept, description: str, search_aliases: list[str], more_outputs: tuple = (), more_inputs: tuple = ()
) -> io.Schema:
    """The schema of a Load node; more_outputs stand behind the thing and its report, more_inputs behind the file."""
    return io.Schema(
        node_id=f"PalimpsestLoad{kept.id}",
        display_name=f"Load {kept.name}",
        category=kept.category,
        description=description,
        search_aliases=search_aliases,
        inputs=[
            io.Combo.Input(
                "file",
                options=kept.shelf.listed(),
                tooltip=f"A file in models/{kept.shelf.folder}. Refresh (R) lists those that others put there.",
            ),
            *more_inputs,
        ],
        outputs=[
            kept.socket.Output(display_name=kept.input, tooltip=f"For {kept.used_by}."),
            io.String.Output(display_name="report", tooltip="What the file holds."),
            *more_outputs,
        ],
        hidden=inputs.unique_id(),
    )


def load(
    node: Any,
    kept: Kept,
    file: str,
    more: Callable[[Any], tuple] = lambda thing: (),
    made: Callable[[Any], Any] = lambda thing: thing,
) -> io.NodeOutput:
    """The thing in a file and its report; more: what it gives for more_outputs; made: what more_inputs make of it."""
    path = kept.shelf.path(file)
    thing = made(kept.load(path))
    with kept.shelf.guarded(path):
        report = kept.describe(thing)
    return io.NodeOutput(thing, report, *more(thing), ui=host.told(node, report))
