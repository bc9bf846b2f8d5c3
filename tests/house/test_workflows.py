"""Every shipped workflow through the host's HTTP API, as a script or a service would queue it."""

from __future__ import annotations

import json

import make_thumbnails
import make_workflows
import pytest
from graphs import pocket
from graphs.shelf import WITHOUT_WEIGHTS, numbered
from graphs.shipped import (
    API,
    MAKES_TUNING,
    WORKFLOWS,
    api_form,
    check_pictures,
    nodes_of,
    pocket_form,
    provide_files,
)
from graphs.titles import name_of, title_of

NAMES = [path.stem for path in WORKFLOWS]


def test_every_workflow_has_its_api_form():
    assert NAMES
    assert sorted(path.stem for path in API.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_api_form_is_the_workflow(name):
    """Same nodes, links and values; a browser test shows that the editor sees it so, too."""
    graph = json.loads((WORKFLOWS[0].parent / f"{name}.json").read_text(encoding="utf-8"))
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    prompt = api_form(name)
    assert {key: node["type"] for key, node in nodes.items() if node["type"] != "MarkdownNote"} == {
        key: node["class_type"] for key, node in prompt.items()
    }
    for key, node in prompt.items():
        linked = {i["name"]: links[i["link"]] for i in nodes[key].get("inputs", []) if i.get("link") is not None}
        assert {n: value for n, value in node["inputs"].items() if isinstance(value, list)} == linked
        held = nodes[key].get("widgets_values") or []
        assert all(value in held for value in node["inputs"].values() if not isinstance(value, list | dict))


def test_templates_are_numbered_as_they_stand_on_the_shelf():
    """Those that need weights which nobody has published stand last; a new one stands before them."""
    titles = {title_of(name) for name in NAMES}
    assert sorted(numbered(titles).values()) == NAMES
    without = [title for _, named in WITHOUT_WEIGHTS for title in named]
    assert [title_of(name) for name in NAMES[-len(without) :]] == without
    more = numbered({*titles, "Another (New)"})
    assert sorted(more.values())[-len(without) - 1] == more["Another (New)"]


def test_tables_by_title_name_templates():
    titles = {title_of(name) for name in NAMES}
    tables = (pocket.ONLY, pocket.OF_OTHER_KINDS, make_thumbnails.OTHERS, make_thumbnails.DRAWN_ELSEWHERE)
    assert {title for table in tables for title in table} <= titles
    with pytest.raises(ValueError, match="0 templates with the title 'None such'"):
        name_of("None such")


def test_every_graph_is_a_workflow_with_the_values_it_gives():
    assert sorted(make_workflows.GRAPHS) == NAMES
    for name, describe in make_workflows.GRAPHS.items():
        nodes = [n for n in describe()["nodes"].values() if n["type"] != "MarkdownNote"]
        saved = [(node["class_type"], node["inputs"]) for node in api_form(name).values()]
        for node in nodes:
            kind, wired = node["type"], {"control_after_generate", *node.get("inputs", {})}
            wanted = {key: value for key, value in node.get("widgets", {}).items() if key not in wired}
            assert any(kind == k and wanted.items() <= i.items() for k, i in saved), f"{name}: {kind} {wanted}"


@pytest.mark.parametrize("name", NAMES)
def test_the_nodes_of_a_workflow_agree(name):
    """Noise that was found with some steps, schedule and guidance belongs to the same ones, also from a file."""
    prompt = api_form(name)
    made = api_form(MAKES_TUNING) if nodes_of(prompt, "PalimpsestLoadKV") else prompt
    inversions, tunings = nodes_of(made, "PalimpsestInvert"), nodes_of(made, "PalimpsestTuneKV")
    samplers = nodes_of(prompt, "KSamplerAdvanced")
    if not (inversions and samplers):
        return  # nothing is inverted, or nothing sampled
    (sampler,) = samplers
    assert {(i["steps"], i["scheduler"]) for i in inversions} == {(sampler["steps"], sampler["scheduler"])}
    assert {tuning["guidance"] for tuning in tunings} <= {sampler["cfg"]}
    assert sampler["add_noise"] == "disable"
    assert sampler["sampler_name"] == "euler"


def test_a_saved_tuning_needs_neither_its_picture_nor_its_inversion():
    """A photo is loaded only to be compared with."""
    reusing = [prompt for prompt in map(api_form, NAMES) if nodes_of(prompt, "PalimpsestLoadKV")]
    assert len(reusing) == 3
    for prompt in reusing:
        assert not any(nodes_of(prompt, kind) for kind in ("VAEEncode", "PalimpsestInvert"))
        photos = [key for key, node in prompt.items() if node["class_type"] == "LoadImage"]
        wired = [(n["class_type"], v) for n in prompt.values() for v in n["inputs"].values() if isinstance(v, list)]
        users = {kind for kind, link in wired if link[0] in photos}
        assert users <= {"ImageCompare"}


def test_the_pocket_takes_the_place_of_every_value_that_it_has_no_use_for():
    """No checkpoint, picture, prompt or size of SD 1.5 reaches a test's run."""
    theirs = ("v1-5", "palimpsest_cat", "palimpsest_coffee", "tabby", "cup")
    for name in NAMES:
        for node in pocket_form(name).values():
            for key, value in node["inputs"].items():
                assert not (isinstance(value, str) and any(word in value for word in theirs)), f"{name}: {key} {value}"
                assert not (key in ("width", "height") and value > 256), f"{name}: {key} {value}"


DIRECTORIES = {  # of what a loader loads
    "CheckpointLoaderSimple": "checkpoints", "UNETLoader": "diffusion_models", "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders", "VAELoader": "vae", "ControlNetLoader": "controlnet",
}  # fmt: skip


def test_every_checkpoint_can_be_downloaded_from_the_editor():
    for name in NAMES:
        graph = json.loads((WORKFLOWS[0].parent / f"{name}.json").read_text(encoding="utf-8"))
        loaders = [node for node in graph["nodes"] if node["type"] in DIRECTORIES]
        wired = {key for node in api_form(name).values() for key in node["inputs"]}
        assert loaders or not wired & {"model", "clip", "vae"}, name
        for loader in loaders:
            models = loader["properties"]["models"]
            files = [v for v in loader["widgets_values"] if isinstance(v, str) and v.endswith(".safetensors")]
            assert [model["name"] for model in models] == files
            for model in models:
                assert model["url"].startswith("https://huggingface.co/") and model["name"] in model["url"]
                assert model["directory"] == DIRECTORIES[loader["type"]]


def test_every_picture_ships_with_the_pack():
    shipped = {path.name for path in (WORKFLOWS[0].parent / "pictures").iterdir()}
    for name in NAMES:
        assert {inputs["image"] for inputs in nodes_of(api_form(name), "LoadImage")} <= shipped, name


@pytest.mark.runs_in_browser
@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_headless(client, name):
    prompt = pocket_form(name, short=True)
    provide_files(client, prompt)
    check_pictures(client, prompt, client.queue(prompt))
