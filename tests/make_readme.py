"""Write README's tables: of nodes, a row for each technique with the first sentence of its nodes.py; of templates.

python dev.py make readme
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import ModuleType

from graphs.shelf import numbered, rows
from graphs.titles import FOLDER, title_of

README = Path(__file__).resolve().parent.parent / "README.md"


def row(technique: ModuleType, names: list[str]) -> str:
    """| its nodes | what they do |"""
    sentence = technique.__doc__.partition("\n")[0].removesuffix(".")
    return f"| {', '.join(shortened(names))} | {sentence[0].lower()}{sentence[1:]} |"


def shortened(names: list[str]) -> list[str]:
    """Save X and Load X are Save and Load: what they keep stands in the same row."""
    kept = {name.removeprefix("Save ") for name in names if name.startswith("Save ")}
    short = {f"{verb} {thing}": verb for thing in kept for verb in ("Save", "Load")}
    return [short.get(name, name) for name in names]


def in_block(name: str, lines: list[str], text: str) -> str:
    """The text with these lines between its marks <!-- name --> and <!-- /name -->."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    return block.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text)


def templates() -> list[str]:
    """| their numbers and short names | what they are for |"""
    titles = [title_of(path.stem) for path in FOLDER.glob("*.json")]
    numbers = {title: name.partition(" ")[0] for title, name in numbered(titles).items()}
    called = [(", ".join(f"{numbers[title]} {short}" for title, short in named.items()), use)
              for use, named in rows(titles)]  # fmt: skip
    return ["| template | what it is for |", "|---|---|", *(f"| {names} | {use} |" for names, use in called)]


def filled(text: str) -> str:
    """README with its tables as nodes and templates are now."""
    from palimpsest.nodes import extension

    async def rows() -> list[str]:
        made = await extension.Palimpsest().get_node_list()
        names = {node.GET_SCHEMA().node_id: node.GET_SCHEMA().display_name for node in made}
        ids = {each: [node.GET_SCHEMA().node_id for node in each.NODES] for each in extension.TECHNIQUES}
        return [row(each, [names[id] for id in found]) for each, found in ids.items()]

    lines = ["| node | what it does |", "|---|---|", *asyncio.run(rows())]
    return in_block("templates", templates(), in_block("nodes", lines, text))


def main() -> None:
    from palimpsest.nodes import extension

    extension.register_folders()
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
