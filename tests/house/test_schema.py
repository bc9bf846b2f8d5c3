"""What every node tells people, what saved graphs rely on; texts, help pages and workflows cover every node."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import make_locales
import make_object_info
import make_readme
import pytest
from comfy_api.latest import io
from palimpsest.nodes.extension import Palimpsest, register_folders

ROOT = Path(__file__).resolve().parents[2]
register_folders()
NODES = asyncio.run(Palimpsest().get_node_list())
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
IDS = sorted(SCHEMAS)
PICTURES = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")


@pytest.fixture(params=IDS)
def schema(request) -> io.Schema:
    return SCHEMAS[request.param]


def test_ids_carry_the_packs_prefix_and_are_unique():
    assert len(SCHEMAS) == len(NODES)
    assert all(re.fullmatch(r"Palimpsest[A-Z]\w+", node_id) for node_id in IDS)


def test_a_node_says_what_it_is(schema):
    assert schema.display_name
    assert schema.description.endswith(".")
    assert schema.search_aliases
    assert re.fullmatch(r"palimpsest/[a-z]+", schema.category)


def test_every_input_and_output_has_a_tooltip(schema):
    for item in [*schema.inputs, *schema.outputs]:
        assert item.tooltip, item.display_name or item.id
        assert item.tooltip.strip().endswith("."), item.tooltip
        assert "  " not in item.tooltip


def test_numbers_are_bounded(schema):
    """A workflow file is written by others."""
    for item in schema.inputs:
        if isinstance(item, io.Int.Input | io.Float.Input):
            assert item.min is not None, item.id
            assert item.max is not None, item.id
            assert item.min <= item.default <= item.max, item.id


# Nodes with several sockets of the type of an output: what a bypassed node is to hand on.
HANDED_ON = {
    ("PalimpsestKeepOutside", "image"): "edited",
    ("PalimpsestEditReport", "picture"): "edited",
    ("PalimpsestBuildMultimodalDataset", "contact_sheet"): "images",
    ("PalimpsestTrainLoRA", "plot"): "images",
    ("PalimpsestApplyTextControl", "positive"): "positive",
    ("PalimpsestApplyTextControl", "negative"): "negative",
    ("PalimpsestTrainLoRA", "sheet"): "images",
    ("PalimpsestTrainInstruction", "plot"): "pictures",
    ("PalimpsestTrainInstruction", "sheet"): "pictures",
}


def handed_on(schema: io.Schema, slot: int) -> str:
    """What the editor takes in place of an output of a bypassed node: the input of its slot or type, the first."""
    kind = schema.outputs[slot].io_type
    order = [*schema.inputs[slot : slot + 1], *schema.inputs]
    return next(item.id for item in order if item.io_type == kind)


def test_a_bypassed_node_hands_on_the_edit(schema):
    for slot, output in enumerate(schema.outputs):
        same = [item.id for item in schema.inputs if item.io_type == output.io_type and not is_widget(item)]
        if len(same) > 1:
            assert handed_on(schema, slot) == HANDED_ON[schema.node_id, output.display_name], same


def is_widget(item: io.Input) -> bool:
    return isinstance(item, io.Int.Input | io.Float.Input | io.String.Input | io.Boolean.Input | io.Combo.Input)


# ------------------------------------------------------------------------------------------------------ the languages


def test_the_english_texts_are_the_schemas():
    for file, content in make_locales.english().items():
        assert make_locales.read("en", file) == content, "run `python dev.py make locales`"


def test_the_readme_has_every_node_and_template():
    text = make_readme.README.read_text(encoding="utf-8")
    assert make_readme.filled(text) == text, "run `python dev.py make readme`"
    assert "| Keep Outside |" in text
    assert "| 01 Change what a subject does |" in text


def test_a_row_of_the_readme():
    technique = SimpleNamespace(__doc__="An edit sees *this*.\n\nMore.")
    names = ["Tune KV", "Save KV", "Load KV", "Load Other"]
    assert make_readme.row(technique, names) == "| Tune KV, Save, Load, Load Other | an edit sees *this* |"


@pytest.mark.parametrize("language", make_locales.languages())
def test_a_translation_is_complete(language):
    assert make_locales.differences(language, make_locales.english()) == []


def test_chinese_is_there():
    assert "zh" in make_locales.languages()


def test_a_missing_and_a_stray_text_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(make_locales, "LOCALES", tmp_path)
    make_locales.write({"A": {"name": "x", "old": "y", "tooltip": " "}}, tmp_path / "xx" / "nodeDefs.json")
    found = make_locales.differences("xx", {"nodeDefs.json": {"A": {"name": "a", "tooltip": "b", "more": "c"}}})
    assert found == [
        "locales/xx/nodeDefs.json lacks A > more",
        "locales/xx/nodeDefs.json has A > old, which no node has",
        "locales/xx/nodeDefs.json has no text for A > tooltip",
    ]


# -------------------------------------------------------------------------------------------- help pages and workflows


def test_a_help_page_has_its_pictures(schema):
    page = ROOT / "web" / "docs" / f"{schema.node_id}.md"
    text = page.read_text(encoding="utf-8")
    pictures = PICTURES.findall(text)
    assert pictures, "a help page shows at least one picture"
    for picture in pictures:
        assert picture.startswith(f"{schema.node_id}/"), "pictures are found relative to web/docs"
        assert (page.parent / picture).is_file(), f"{picture}: run `python dev.py make pictures/<technique>`"


def test_a_help_page_names_every_input(schema):
    text = (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    missing = [item.id for item in schema.inputs if f"`{item.id}`" not in text]
    assert missing == []


def test_a_help_page_is_there_in_chinese(schema):
    """The editor asks for <NodeId>/<locale>.md; paths of pictures are relative to web/docs there, too."""
    folder = ROOT / "web" / "docs"
    english = (folder / f"{schema.node_id}.md").read_text(encoding="utf-8")
    chinese = (folder / schema.node_id / "zh.md").read_text(encoding="utf-8")
    assert [item.id for item in schema.inputs if f"`{item.id}`" not in chinese] == []
    assert PICTURES.findall(chinese) == PICTURES.findall(english)
    names = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))[schema.node_id]
    assert chinese.startswith(f"# {names['display_name']}\n"), "the page's title is the node's"
    missing = [each["name"] for each in names["inputs"].values() if f"**{each['name']}**" not in chinese]
    assert missing == [], "inputs are named as the node names them"
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 100


def test_tables_of_help_pages_have_two_columns(schema):
    """The panel is about 300 pixels wide: a third column cannot be read."""
    folder = ROOT / "web" / "docs"
    for page in (folder / f"{schema.node_id}.md", folder / schema.node_id / "zh.md"):
        rules = [line for line in page.read_text(encoding="utf-8").splitlines() if re.fullmatch(r"\|[-:| ]+\|", line)]
        assert [line for line in rules if line.count("|") > 3] == [], page.name


def test_every_node_is_in_a_workflow(schema):
    workflows = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "workflows").glob("*.json")]
    held = {node["type"] for workflow in workflows for node in workflow["nodes"]}
    assert schema.node_id in held, "describe one in tests/<technique>/graph.py, then `python dev.py make workflows`"


# -------------------------------------------------------------------------------------------- what saved graphs rely on


@pytest.fixture(scope="module")
def served(client) -> dict:
    """What the running host tells of every node, without texts, ranges and defaults."""
    return {node_id: make_object_info.promised(client.object_info(node_id)) for node_id in IDS}


def test_the_host_serves_the_nodes_that_older_graphs_hold(served):
    """Ids, inputs, types, choices and the order of widgets and outputs: append, never reorder."""
    kept = make_object_info.read()
    assert kept
    assert make_object_info.breaks(kept, served) == []
    assert kept == served, "something was appended: run `python dev.py make object_info`"


def test_every_breaking_change_is_found():
    kept = make_object_info.read()
    assert make_object_info.breaks(kept, kept) == []
    node = "PalimpsestApplyKV"

    def broken(change) -> list[str]:
        changed = copy.deepcopy(kept)
        change(changed)
        return make_object_info.breaks(kept, changed)

    assert broken(lambda new: new.pop(node)) == [f"{node} is gone"]
    assert "was FLOAT" in broken(lambda new: new[node]["inputs"].update(strength="INT"))[0]
    assert "is gone" in broken(lambda new: new[node]["inputs"].pop("mask"))[0]
    assert "required" in broken(lambda new: new[node]["required"].append("mask"))[0]
    assert "reorder" in broken(lambda new: new[node]["widgets"].reverse())[0]
    assert "reorder" in broken(lambda new: new[node]["widgets"].insert(0, "first"))[0]
    assert "reorder" in broken(lambda new: new[node]["outputs"].clear())[0]
    assert "lost" in broken(lambda new: new[node]["options"]["mode"].remove("frozen"))[0]
    assert broken(lambda new: new[node]["widgets"].append("last")) == []
