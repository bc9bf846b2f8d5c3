"""The workflows the pack ships, for the tests: in API format, made short, and with the files they need."""

from __future__ import annotations

import copy
import json
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((TESTS.parent / "workflows").glob("*.json"))
API = TESTS / "data" / "api"
SHORT = {"steps": 4, "inner_steps": 2}  # set in every node that has them, so that a run takes seconds on a CPU
MAKES_TUNING = "Edit an action in a photo (KV Inversion)"
MAKERS = {  # node that loads a file: workflow that writes it
    "PalimpsestLoadKV": MAKES_TUNING,
    "PalimpsestLoadContextAdapter": "Align a picture with its prompt (Context)",
    "PalimpsestLoadBlendWeights": "Learn how much of the photo flows back (Regions)",
}


def api_form(name: str) -> dict:
    """A workflow as the host takes it. A browser test holds it equal to what the editor makes of the UI format."""
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


def shortened(prompt: dict) -> dict:
    """The same graph with few steps."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in SHORT.items() if name in node["inputs"]}
    return prompt


def files_wanted(prompt: dict) -> dict[str, str]:
    """Saved files that a graph loads, and the node that loads each."""
    return {n["inputs"]["file"]: n["class_type"] for n in prompt.values() if n["class_type"] in MAKERS}


def provide_files(client, prompt: dict) -> None:
    """Run, where a saved file is missing on the host, the workflow that writes it."""
    for file, loader in files_wanted(prompt).items():
        if file not in listed(client, loader):
            client.queue(shortened(api_form(MAKERS[loader])))
        assert file in listed(client, loader), f"{MAKERS[loader]} does not write {file}"


def listed(client, loader: str) -> list[str]:
    """The files that a node offers."""
    kind, *options = client.object_info(loader)["input"]["required"]["file"]
    return options[0]["options"] if kind == "COMBO" else kind
