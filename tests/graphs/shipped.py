"""The workflows the pack ships, for the tests: in API format, with the pocket's values, and the files they need."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from graphs.pocket import SHORT, in_place
from graphs.titles import name_of

TESTS = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((TESTS.parent / "workflows").glob("*.json"))
API = TESTS / "data" / "api"
MAKES_TUNING = name_of("Change what a subject does (KV Inversion)")
MAKERS = {  # node that loads a file: workflow that writes it
    "PalimpsestLoadKV": MAKES_TUNING,
    "PalimpsestLoadContextAdapter": name_of("Align a picture with its prompt (Context)"),
    "PalimpsestLoadBlendWeights": name_of("Learn how much of the photo flows back (Regions)"),
}


def api_form(name: str) -> dict:
    """A workflow as the host takes it. A browser test holds it equal to what the editor makes of the UI format."""
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


def pocket_form(name: str, *, short: bool = False) -> dict:
    """The same graph with the pocket's values; short: with few steps."""
    return in_place(name, api_form(name), SHORT if short else None)


def files_wanted(prompt: dict) -> dict[str, str]:
    """Saved files that a graph loads, and the node that loads each."""
    return {n["inputs"]["file"]: n["class_type"] for n in prompt.values() if n["class_type"] in MAKERS}


def provide_files(client, prompt: dict) -> None:
    """Run, where a saved file is missing on the host, the workflow that writes it."""
    for file, loader in files_wanted(prompt).items():
        if file not in listed(client, loader):
            client.queue(pocket_form(MAKERS[loader], short=True))
        assert file in listed(client, loader), f"{MAKERS[loader]} does not write {file}"


def listed(client, loader: str) -> list[str]:
    """The files that a node offers."""
    kind, *options = client.object_info(loader)["input"]["required"]["file"]
    return options[0]["options"] if kind == "COMBO" else kind


def nodes_of(prompt: dict, kind: str) -> list[dict]:
    return [node["inputs"] for node in prompt.values() if node["class_type"] == kind]


def pictures_wanted(prompt: dict) -> tuple[int, tuple[int, int]]:
    """(number, size) of the pictures that each save node writes: one a line or empty latent, sources side by side.

    Of synthetic prompts one for each content in each of its styles.
    """
    lines = [line for node in nodes_of(prompt, "PalimpsestPromptLines") for line in node["lines"].splitlines()]
    for node in nodes_of(prompt, "PalimpsestSyntheticPrompts"):
        styles = len(node["styles"].splitlines())
        lines += node["contents"].splitlines() * min(styles, node["styles_each"])
    empty = nodes_of(prompt, "EmptyLatentImage")
    side_by_side = len(nodes_of(prompt, "LatentConcat")) + 1
    width = max((node["width"] for node in empty), default=128 * side_by_side)
    return len(lines) or sum(node["batch_size"] for node in empty) or 1, (width, 128)


def source_of(prompt: dict, node_id: str) -> str:
    """The kind of node that a picture or mask comes from."""
    inputs = prompt[node_id]["inputs"]
    return prompt[inputs.get("images", inputs.get("mask"))[0]]["class_type"]


def check_pictures(client, prompt: dict, entry: dict) -> None:
    """Assert that a run of a workflow saved as many pictures as it should, of the right size, none of one colour."""
    count, size = pictures_wanted(prompt)
    saved = [key for key, node in prompt.items() if node["class_type"] in ("SaveImage", "SaveAnimatedWEBP")]
    previews = [key for key, node in prompt.items() if node["class_type"] in ("PreviewImage", "MaskPreview")]
    for node_id in saved:
        one_clip = prompt[node_id]["class_type"] == "SaveAnimatedWEBP"
        assert len(client.images(entry, node_id)) == (1 if one_clip else count)
    for node_id in [*saved, *previews]:
        for data in client.images(entry, node_id):
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            if source_of(prompt, node_id) in ("VAEDecode", "PalimpsestKeepOutside"):  # others are maps and plots
                assert picture.size == (size if node_id in saved else (128, 128))
            assert all(low < high for low, high in picture.getextrema()), "a picture of one colour"
