"""A bypassed Keep Outside in the graph editor hands on the edit, and graphs saved before keep their links."""

import json
from pathlib import Path

from browser.editor import Editor, needs_browser

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NODE = "PalimpsestKeepOutside"


def with_source_first(workflow: dict) -> dict:
    """As the editor saved it when `source` was the first socket: links name their sockets by number, too."""
    for node in (node for node in workflow["nodes"] if node["type"] == NODE):
        node["inputs"].sort(key=lambda entry: {"source": 0, "edited": 1}.get(entry["name"], 2))
        for slot, entry in enumerate(node["inputs"]):
            for link in (link for link in workflow["links"] if link[0] == entry.get("link")):
                link[4] = slot
    return workflow


def test_a_bypassed_keep_outside_hands_on_the_edit(server):
    needs_browser()
    file = next(WORKFLOWS.glob("*Keep everything else*.json"))
    workflow = with_source_first(json.loads(file.read_text(encoding="utf-8")))
    with Editor("bypass.mjs", server.url) as editor:
        found = editor.ask({"workflow": workflow, "type": NODE})
    assert found["before"][f"{NODE}.source"] == "LoadImage[0]"
    assert found["before"][f"{NODE}.edited"] == "VAEDecode[0]"
    assert found["bypassed"]["SaveImage.images"] == "VAEDecode[0]"
