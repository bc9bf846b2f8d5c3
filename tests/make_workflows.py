"""Build the shipped workflows in the real graph editor, so that they are saved exactly as the editor saves.

    python dev.py make workflows          writes workflows/*.json and, in API format, tests/data/api/*.json
    ... make_workflows --of "^05"         some of them, by their names as they will be

Needs a browser as the browser tests do. The graphs are described in tests/<technique>/graph.py,
their order, from which the numbers follow, in tests/graphs/shelf.py. Files of a template that got another number are
renamed, its thumbnail too, and it keeps its id. The thumbnails come from make_pictures.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import uuid
from pathlib import Path

from browser.editor import Editor
from graphs.shelf import numbered
from graphs.titles import title_of
from workshop.browsers import prepare_browser
from workshop.hosts import set_up
from workshop.serving import environment, open_host

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows"
API = ROOT / "tests" / "data" / "api"

ROOMS = {path.parent.name for path in ROOT.glob("tests/*/graph.py")}
TITLED = {title: of for room in sorted(ROOMS) for title, of in importlib.import_module(f"{room}.graph").GRAPHS.items()}
NAMES = numbered(TITLED)
GRAPHS = {name: TITLED[title] for title, name in NAMES.items()}


def write(value: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def put_in_order() -> None:
    """Files of a template get the name it has now; those of one that is no more are removed."""
    for path in [*WORKFLOWS.glob("*.json"), *WORKFLOWS.glob("*.jpg"), *API.glob("*.json")]:
        title = title_of(path.stem)
        if title in NAMES:
            path.rename(path.with_name(NAMES[title] + path.suffix))
        else:
            path.unlink()


def id_of(name: str) -> str:
    """The id that the template has already, else one of its title: the editor draws a new one each time."""
    saved = WORKFLOWS / f"{name}.json"
    if saved.is_file():
        return json.loads(saved.read_text(encoding="utf-8"))["id"]
    return str(uuid.uuid5(uuid.NAMESPACE_URL, title_of(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="", help="only workflows whose names have this (a regular expression) in them")
    wanted = re.compile(parser.parse_args().of)
    place, browser = set_up(None), prepare_browser()
    os.environ.update(environment(place, browser))
    put_in_order()
    with (
        open_host(place, "workflows", None) as host,
        Editor("author_workflows.mjs", host.url) as editor,
    ):
        for name, describe in ((name, of) for name, of in GRAPHS.items() if wanted.search(name)):
            made = editor.ask(describe())
            if made["pageErrors"]:
                raise RuntimeError(f"{name}: {made['pageErrors']}")
            made["workflow"]["id"] = id_of(name)
            write(made["workflow"], WORKFLOWS / f"{name}.json")
            write(made["prompt"], API / f"{name}.json")
