"""Build the shipped workflows in the real graph editor, so that they are saved exactly as the editor saves.

    python tests/make_workflows.py          writes workflows/*.json and, in API format, tests/data/api/*.json

Needs a browser as the browser tests do. The graphs are described in tests/<technique>/graph.py.
The thumbnails come from make_pictures.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import contextdiff.graph
import cross_attention.graph
import kv.graph
import multimodal.graph

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows"
API = ROOT / "tests" / "data" / "api"

GRAPHS = kv.graph.GRAPHS | cross_attention.graph.GRAPHS | contextdiff.graph.GRAPHS | multimodal.graph.GRAPHS


def author(url: str, description: dict, browser) -> dict:
    """The graph as the editor saves it: {"workflow": UI format, "prompt": API format}."""
    script = ROOT / "tests" / "browser" / "author_workflow.mjs"
    env = {**os.environ, "PALIMPSEST_CHROMIUM": str(browser.chromium), "PALIMPSEST_NODE_PATH": str(browser.node_path)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "description.json"
        path.write_text(json.dumps(description), encoding="utf-8")
        command = [shutil.which("node"), script, url, path]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, env=env)
    if done.returncode:
        raise RuntimeError(f"the editor could not build the graph:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(value: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def main() -> None:
    from conftest import dev

    place, browser = dev.set_up(None), dev.prepare_browser()
    with dev.open_host(place, "workflows", None) as host:
        for name, describe in GRAPHS.items():
            made = author(host.url, describe(), browser)
            made["workflow"]["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, name))  # the editor draws a new one each time
            write(made["workflow"], WORKFLOWS / f"{name}.json")
            write(made["prompt"], API / f"{name}.json")


if __name__ == "__main__":
    main()
