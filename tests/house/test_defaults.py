"""Defaults: a graph of the API may leave them out, and node, settings and literature agree on them."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib
import inspect
import textwrap

import execution
import folder_paths
import pytest
from palimpsest.nodes import inputs
from palimpsest.nodes.edit_report.measuring import Edit
from palimpsest.nodes.extension import Palimpsest, register_folders
from palimpsest.nodes.settings import Settings

import nodes as host_nodes

register_folders()
OURS = {node.GET_SCHEMA().node_id: node for node in asyncio.run(Palimpsest().get_node_list())}


def settings_of(function) -> type | None:
    """The settings that `chosen` fills: named in a node's `execute`, or in what that hands `chosen` to."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    for call in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(call, ast.Call) and any(getattr(part, "id", "") == "chosen" for part in ast.walk(call)):
            first, *rest = ast.unparse(call.func).removesuffix(".of").split(".")
            found = functools.reduce(
                lambda value, each: getattr(value, each, None), rest, function.__globals__.get(first)
            )
            found = settings_of(found) if inspect.isfunction(found) else found
            if inspect.isclass(found) and issubclass(found, Settings | Edit):
                return found
    return None


SAID = {  # what only a person can say, and the host's files: the widgets that stay required
    "file": "made.safetensors",
    "folder": "made",
    "text": "a <image1> cat",
    "words": "cat",
    "contents": "a [cat]",
    "phrase": "a red fox",
    "lines": "sitting",
    "source_text": "a cat",
    "edit_text": "a dog",
}
LITERATURE = {  # nodes and values that papers print for SD 1.x, or that their authors' code holds
    "PalimpsestInvert": {"steps": 50, "guidance": 1.0, "predict_at": "next noise level"},
    "PalimpsestFlowEdit": {"source_guidance": 3.5, "start_percent": 0.34, "end_percent": 1.0, "averages": 1},
    "PalimpsestTuneKV": {"guidance": 7.5, "layers": "decoder", "inner_steps": 10, "learning_rate": 0.01,
                         "tolerance": 1e-5, "warm_start": True},
    "PalimpsestApplyKV": {"source_guidance": 3.0, "start_percent": 0.1, "end_percent": 1.0},
    "PalimpsestFeatureBlend": {"alpha_inside": 1.0, "alpha_outside": 0.0, "blend_latents_until": 0.5},
    "PalimpsestTuneFeatureBlend": {"guidance": 7.5},
    "PalimpsestAttentionFusion": {"self_attention_until": 0.5, "cross_attention_until": 0.5, "blend_threshold": 0.3,
                                  "layers": "all but the finest"},
    "PalimpsestTrainContextAdapter": {"steps": 200, "min_snr_gamma": 5.0, "learning_rate": 0.0001},
    "PalimpsestTrainInstruction": {"drop_text": 0.05, "drop_both": 0.05, "drop_picture": 0.05, "learning_rate": 0.0001,
                                   "text_guidance": 7.5, "picture_guidance": 1.5},
    "PalimpsestBuildMultimodalDataset": {"min_side": 150, "max_share": 0.75, "max_crops": 3, "head_share": 0.7,
                                         "vary_share": 0.2, "whole_share": 0.3, "box_threshold": 0.35,
                                         "text_threshold": 0.25},
    "PalimpsestTrainMultimodal": {"connector_rate": 1e-5, "language_rate": 3e-6, "unet_rate": 5e-6, "lora_rank": 8,
                                  "depth": 16},
    "PalimpsestTextLines": {"size": 0.8, "spacing": 1.0, "width": 512, "height": 512},
    "PalimpsestApplyTextControl": {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "keep_rest": False},
    "PalimpsestTrainTextControl": {"learning_rate": 2e-5, "blank_share": 0.5, "resolution": 512, "guidance": 9.0},
    "PalimpsestExpressInstruction": {"max_tokens": 96, "summary_words": 32},
}  # fmt: skip


def shown(entry) -> object:
    """The value of a widget in a new graph."""
    return entry.default if entry.default is not None else entry.options[0]


def widgets(node) -> dict[str, object]:
    """The inputs of a node that are widgets with a value."""
    return {entry.id: entry for entry in node.define_schema().inputs if inputs.has_default(entry)}


# ----------------------------------------------------------------------------------------------- one default, said once


@pytest.mark.parametrize("name", OURS)
def test_every_widget_with_a_default_is_optional(name):
    required = {entry.id for entry in widgets(OURS[name]).values() if not entry.optional}
    assert required <= SAID.keys(), "put @inputs.completed() on define_schema"


@pytest.mark.parametrize("name", OURS)
def test_a_widget_that_is_left_out_has_the_default_that_the_editor_shows(name):
    node = OURS[name]
    parameters = inspect.signature(node.execute).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    fields = settings_of(node.execute).__dataclass_fields__ if takes_any else {}
    for entry in widgets(node).values():
        if not entry.optional or entry.id == "preset":
            continue
        given = parameters[entry.id].default if entry.id in parameters else fields[entry.id].default
        given = given[0] if node.define_schema().is_input_list and isinstance(given, tuple) else given
        if entry.id != "filename":  # None, for which saving.save takes the node's own
            assert given == shown(entry), entry.id


@pytest.mark.parametrize("name", LITERATURE)
def test_defaults_are_the_literatures(name):
    assert {id: shown(entry) for id, entry in widgets(OURS[name]).items() if id in LITERATURE[name]} == LITERATURE[name]


def test_what_papers_print_for_their_own_models_is_no_longer_needed_to_be_known():
    """No tooltip gives a value for the small test model."""
    for name, node in OURS.items():
        for entry in node.define_schema().inputs:
            assert "pocket" not in (entry.tooltip or ""), f"{name}: {entry.id}"


# ---------------------------------------------------------------------------------------------------- graphs of the API

HOSTS = {  # socket type -> (node of the host, its number of output, what it must be told)
    "MODEL": ("CheckpointLoaderSimple", 0, {"ckpt_name": "made.safetensors"}),
    "CLIP": ("CheckpointLoaderSimple", 1, {"ckpt_name": "made.safetensors"}),
    "VAE": ("CheckpointLoaderSimple", 2, {"ckpt_name": "made.safetensors"}),
    "LATENT": ("EmptyLatentImage", 0, {"width": 64, "height": 64, "batch_size": 1}),
    "IMAGE": ("EmptyImage", 0, {"width": 64, "height": 64, "batch_size": 1, "color": 0}),
    "MASK": ("SolidMask", 0, {"value": 1.0, "width": 64, "height": 64}),
}
EXTRAS = {"SolidMask": "nodes_mask", "PreviewAny": "nodes_preview_any"}


def of_the_host(kind: str) -> type:
    """A node class of the host, also one of its extras."""
    if kind in host_nodes.NODE_CLASS_MAPPINGS:
        return host_nodes.NODE_CLASS_MAPPINGS[kind]
    module = importlib.import_module(f"comfy_extras.{EXTRAS[kind]}")
    if hasattr(module, "NODE_CLASS_MAPPINGS"):
        return module.NODE_CLASS_MAPPINGS[kind]
    return getattr(module, kind)


class Graph:
    """A graph of the API in which nodes are told nothing but their required sockets and what is in SAID."""

    def __init__(self):
        self.prompt: dict[str, dict] = {}

    def link(self, kind: str) -> list:
        """An output of a type, of a node that is added if it is not there."""
        if kind in HOSTS:
            name, output, told = HOSTS[kind]
            self.prompt.setdefault(name, {"class_type": name, "inputs": told})
            return [name, output]
        if kind == "CONDITIONING":
            told = {"clip": self.link("CLIP"), "text": "a cat"}
            self.prompt.setdefault("CLIPTextEncode", {"class_type": "CLIPTextEncode", "inputs": told})
            return ["CLIPTextEncode", 0]
        for name, node in OURS.items():
            schema = node.define_schema()
            types = [output.io_type for output in schema.outputs]
            if kind in types and kind not in {entry.io_type for entry in schema.inputs}:
                return [self.add(name), types.index(kind)]
        raise LookupError(f"no node gives {kind}")

    def add(self, name: str) -> str:
        """A node of ours."""
        if name not in self.prompt:
            self.prompt[name] = {"class_type": name, "inputs": {}}
            needed = OURS[name].GET_NODE_INFO_V1()["input"].get("required", {})
            for entry in (entry for entry in OURS[name].define_schema().inputs if entry.id in needed):
                if entry.io_type == "COMFY_AUTOGROW_V3":
                    continue
                is_widget = entry.id in SAID and not getattr(entry, "force_input", False)
                self.prompt[name]["inputs"][entry.id] = SAID[entry.id] if is_widget else self.link(entry.io_type)
        return name

    def shown(self, name: str) -> dict:
        """The graph, with what the node gives shown."""
        inputs = {"source": [self.add(name), 0]}
        return self.prompt | {"look": {"class_type": "PreviewAny", "inputs": inputs}}


@pytest.fixture
def host_with_files(tmp_path, monkeypatch):
    """The host's node list with ours, and a file in every folder that a loader lists."""
    for kind in OURS | dict.fromkeys([*EXTRAS]):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, kind, OURS.get(kind) or of_the_host(kind))
    for folder in ("checkpoints", *(name for name in folder_paths.folder_names_and_paths if "palimpsest" in name)):
        (tmp_path / folder / "made").mkdir(parents=True)
        (tmp_path / folder / "made.safetensors").touch()
        (tmp_path / folder / "made" / "config.json").write_text("{}", encoding="utf-8")
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(tmp_path / folder)], {".safetensors"}))
    texts = tmp_path / "input" / "palimpsest_texts" / "made"
    texts.mkdir(parents=True)
    (texts / "texts.jsonl").touch()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    return tmp_path


def refused(prompt: dict) -> dict:
    """What the host says against a graph before it runs it."""
    valid, error, _, node_errors = asyncio.run(execution.validate_prompt("test", prompt, None))
    return {} if valid and not node_errors else {"error": error} | node_errors


@pytest.mark.parametrize("name", OURS)
def test_a_graph_with_only_the_sockets_is_taken_by_the_host(host_with_files, name):
    assert refused(Graph().shown(name)) == {}


def test_what_only_a_person_can_say_is_asked_for(host_with_files):
    graph = Graph().shown("PalimpsestSelectWords")
    del graph["PalimpsestSelectWords"]["inputs"]["words"]
    (error,) = refused(graph)["PalimpsestSelectWords"]["errors"]
    assert (error["type"], error["details"]) == ("required_input_missing", "words")


def test_a_file_saved_a_moment_ago_is_taken_by_the_host(host_with_files):
    """The host asks for a loader's list again with every graph; only the editor's list is as old as its page."""
    graph = Graph().shown("PalimpsestLoadKV")
    graph["PalimpsestLoadKV"]["inputs"]["file"] = "new.safetensors"
    assert refused(graph)["PalimpsestLoadKV"]["errors"][0]["type"] == "value_not_in_list"
    (host_with_files / "palimpsest_kv" / "new.safetensors").touch()
    assert refused(graph) == {}
