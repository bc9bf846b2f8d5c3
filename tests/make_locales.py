"""Write locales/en from the nodes' schemas, and say where another language is behind.

    python dev.py make locales          write locales/en/*.json, then check the other languages

The English files are never edited by hand. A translation has the same keys as the English, and no key more; a name or
text in it may be equal to the English one (vae), but not empty.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"


def schemas() -> list[Any]:
    """The pack's nodes' schemas, in the order of the list that the host is given."""
    import asyncio

    from palimpsest.nodes.extension import Palimpsest

    return [node.GET_SCHEMA() for node in asyncio.run(Palimpsest().get_node_list())]


def texts(item: Any) -> dict[str, str]:
    """Name and tooltip of an input or output, as the graph editor reads them."""
    found = {"name": item.display_name or item.id, "tooltip": item.tooltip}
    return {key: text for key, text in found.items() if text}


def node_definitions(nodes: list[Any]) -> dict:
    """The English nodeDefs.json: the front end's key for a node id is the id with each dot replaced."""
    return {
        schema.node_id.replace(".", "_"): {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {item.id: texts(item) for item in schema.inputs},
            "outputs": {str(number): output_texts(item) for number, item in enumerate(schema.outputs)},
        }
        for schema in nodes
    }


def output_texts(item: Any) -> dict[str, str]:
    """An output without a name of its own is shown by its type."""
    found = {"name": item.display_name or item.io_type, "tooltip": item.tooltip}
    return {key: text for key, text in found.items() if text}


def categories(nodes: list[Any]) -> dict[str, str]:
    """The shelves of the node library, each part of their paths once."""
    return {part: part for schema in nodes for part in schema.category.split("/")}


def english() -> dict[str, dict]:
    """File name -> content of every English file."""
    nodes = schemas()
    return {"main.json": {"nodeCategories": categories(nodes)}, "nodeDefs.json": node_definitions(nodes)}


def read(language: str, file: str) -> dict:
    path = LOCALES / language / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as "a > b > c": text."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in leaves(part, f"{path} > {key}" if path else key).items()}


def differences(language: str, wanted: dict[str, dict]) -> list[str]:
    """What a translation lacks, has too much of or left empty, one sentence each."""
    found = []
    for file, content in wanted.items():
        ours, theirs = leaves(content), leaves(read(language, file))
        where = f"locales/{language}/{file}"
        found += [f"{where} lacks {key}" for key in ours if key not in theirs]
        found += [f"{where} has {key}, which no node has" for key in theirs if key not in ours]
        found += [f"{where} has no text for {key}" for key, text in theirs.items() if not str(text or "").strip()]
    return found


def languages() -> list[str]:
    """Every language besides English that has a folder."""
    return sorted(path.name for path in LOCALES.iterdir() if path.is_dir() and path.name != "en")


def write(content: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    from palimpsest.nodes.extension import register_folders

    register_folders()
    wanted = english()
    for file, content in wanted.items():
        write(content, LOCALES / "en" / file)
    problems = [problem for language in languages() for problem in differences(language, wanted)]
    print("\n".join(problems or [f"locales/en is up to date; {', '.join(languages())} complete"]))
    return 1 if problems else 0
