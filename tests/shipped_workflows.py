"""The workflows the pack ships, for the tests: in API format, made short, and with the files they need."""

from __future__ import annotations

import copy
import json
from pathlib import Path

TESTS = Path(__file__).resolve().parent
WORKFLOWS = sorted((TESTS.parent / "workflows").glob("*.json"))
API = TESTS / "data" / "api"
SHORT = {"steps": 4, "inner_steps": 2}  # set in every node that has them, so that a run takes seconds on a CPU
MAKES_TUNING = "Edit an action in a photo (KV Inversion)"


def api_form(name: str) -> dict:
    """A workflow as the host takes it. A browser test holds it equal to what the editor makes of the UI format."""
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


def shortened(prompt: dict) -> dict:
    """The same graph with few steps."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in SHORT.items() if name in node["inputs"]}
    return prompt


def files_wanted(prompt: dict) -> set[str]:
    """Saved tunings that a graph loads."""
    return {node["inputs"]["file"] for node in prompt.values() if node["class_type"] == "PalimpsestLoadKV"}


def provide_files(client, prompt: dict) -> None:
    """Run, where a saved tuning is missing on the host, the workflow that writes it."""
    if files_wanted(prompt) - set(listed(client)):
        client.queue(shortened(api_form(MAKES_TUNING)))
    missing = files_wanted(prompt) - set(listed(client))
    assert not missing, f"{MAKES_TUNING} does not write {missing}"


def listed(client) -> list[str]:
    """The files that Load KV offers."""
    kind, *options = client.object_info("PalimpsestLoadKV")["input"]["required"]["file"]
    return options[0]["options"] if kind == "COMBO" else kind
