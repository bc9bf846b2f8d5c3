"""Build the shipped blueprints in the real graph editor: whole edits as one node, listed in every user's node library.

    python dev.py make blueprints          writes subgraphs/*.json

The host serves a pack's subgraphs/*.json as global subgraphs, and looks nowhere else. Needs a browser as the browser
tests do. The blueprints are described in tests/graphs/blueprints.py.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path

from browser.editor import Editor
from graphs import blueprints
from workshop.browsers import prepare_browser
from workshop.hosts import set_up
from workshop.serving import environment, open_host

SUBGRAPHS = Path(__file__).resolve().parent.parent / "subgraphs"
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
KEPT = (
    "revision",
    "last_node_id",
    "last_link_id",
    "nodes",
    "links",
    "version",
    "definitions",
)  # as the editor publishes


def steady(value: dict, name: str) -> dict:
    """The same JSON with ids that depend on the name alone: the editor draws new ones each time."""
    text = json.dumps(value)
    for i, drawn in enumerate(dict.fromkeys(UUID.findall(text))):
        text = text.replace(drawn, str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name}/{i}")))
    return json.loads(text)


def published(workflow: dict, name: str) -> dict:
    """A workflow of one subgraph as a blueprint, with what the node library shows of it."""
    told = blueprints.BLUEPRINTS[name]()
    (subgraph,) = workflow["definitions"]["subgraphs"]
    subgraph |= {"description": told["description"], "category": told["category"]}
    extra = {"BlueprintDescription": told["description"], "BlueprintSearchAliases": told["aliases"]}
    return steady({key: workflow[key] for key in KEPT} | {"extra": extra}, name)


def main() -> None:
    place, browser = set_up(None), prepare_browser()
    os.environ.update(environment(place, browser))
    with (
        open_host(place, "blueprints", None) as host,
        Editor("blueprints.mjs", host.url, "canvas") as editor,
    ):
        for name in blueprints.BLUEPRINTS:
            made = editor.ask(blueprints.described(name))
            if made["pageErrors"]:
                raise RuntimeError(f"{name}: {made['pageErrors']}")
            SUBGRAPHS.mkdir(exist_ok=True)
            text = json.dumps(published(made["workflow"], name), indent=2, ensure_ascii=False)
            (SUBGRAPHS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
