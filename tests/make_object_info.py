"""Keep tests/data/object_info.json, what saved graphs and scripts rely on, in step with the nodes.

    python dev.py make object_info            append what is new
    python dev.py make object_info --break    write it whatever it breaks

A saved graph holds values by position and links by socket number, and scripts name ids and inputs. So inputs, outputs,
widgets and choices may be appended, never renamed, retyped or taken away; widgets and outputs never reordered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "data" / "object_info.json"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
LISTED_BY_HOST = {
    "scheduler",
    "file",
    "folder",
    "connector",
    "lora",
    "detector",
    "resume",
    "font",
    "embeddings",
}  # combos whose choices are not the pack's own


def read() -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}


def promised(info: dict) -> dict:
    """What a node's definition (the host's object_info) promises, without texts, ranges and defaults."""
    given = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    order = [*info["input_order"].get("required", []), *info["input_order"].get("optional", [])]
    kinds = {name: "COMBO" if isinstance(given[name][0], list) else given[name][0] for name in order}
    combos = [name for name, kind in kinds.items() if kind == "COMBO" and name not in LISTED_BY_HOST]
    return {
        "inputs": kinds,
        "required": sorted(info["input"].get("required", {})),
        "widgets": [name for name, kind in kinds.items() if kind in WIDGETS],
        "options": {name: options(given[name]) for name in combos},
        "outputs": list(info["output"]),
    }


def options(definition: list) -> list:
    """A combo's choices, in either of the two forms the host uses."""
    return definition[0] if isinstance(definition[0], list) else definition[1]["options"]


def breaks(before: dict, after: dict) -> list[str]:
    """Promises of `before` that `after` does not keep, one sentence each."""
    found = []
    for node, old in before.items():
        new = after.get(node)
        if new is None:
            found.append(f"{node} is gone")
            continue
        for name, kind in old["inputs"].items():
            if new["inputs"].get(name) != kind:
                found.append(f"{node}: input {name} was {kind}, is {new['inputs'].get(name, 'gone')}")
        found += [f"{node}: input {name} is now required" for name in new["required"] if name not in old["required"]]
        for name, choices in old["options"].items():
            lost = [choice for choice in choices if choice not in new["options"].get(name, [])]
            found += [f"{node}: {name} lost the choices {lost}"] * bool(lost)
        for part in ("widgets", "outputs"):
            if new[part][: len(old[part])] != old[part]:
                found.append(f"{node}: {part} were {old[part]}, are {new[part]}: append, never reorder")
    return found


def main() -> int:
    import asyncio

    from palimpsest.nodes.extension import Palimpsest, register_folders

    register_folders()
    nodes = asyncio.run(Palimpsest().get_node_list())
    now = {node.GET_SCHEMA().node_id: promised(node.GET_NODE_INFO_V1()) for node in nodes}
    broken = breaks(read(), now)
    if broken and "--break" not in sys.argv:
        print("\n".join([*broken, "Nothing was written; --break writes it nevertheless."]))
        return 1
    GOLDEN.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    print(f"{GOLDEN.name}: {len(now)} nodes")
    return 0
