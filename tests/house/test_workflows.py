"""Every shipped workflow through the host's HTTP API, as a script or a service would queue it."""

from __future__ import annotations

import io

import pytest
from graphs.shipped import API, MAKES_TUNING, WORKFLOWS, api_form, files_wanted, provide_files, shortened
from PIL import Image

NAMES = [path.stem for path in WORKFLOWS]


def nodes_of(prompt: dict, kind: str) -> list[dict]:
    return [node["inputs"] for node in prompt.values() if node["class_type"] == kind]


def test_every_workflow_has_its_api_form():
    assert NAMES
    assert sorted(path.stem for path in API.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_nodes_of_a_workflow_agree(name):
    """Noise that was found with some steps, schedule and guidance belongs to the same ones, also from a file."""
    prompt = api_form(name)
    made = api_form(MAKES_TUNING) if "PalimpsestLoadKV" in files_wanted(prompt).values() else prompt
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
    reusing = [p for p in map(api_form, NAMES) if "PalimpsestLoadKV" in files_wanted(p).values()]
    assert len(reusing) == 2
    for prompt in reusing:
        assert not any(nodes_of(prompt, kind) for kind in ("LoadImage", "VAEEncode", "PalimpsestInvert"))


def pictures_wanted(prompt: dict) -> tuple[int, tuple[int, int]]:
    """(number, size) of the pictures that each save node writes: one a line or empty latent, sources side by side."""
    lines = [line for node in nodes_of(prompt, "PalimpsestPromptLines") for line in node["lines"].splitlines()]
    drawn = sum(node["batch_size"] for node in nodes_of(prompt, "EmptyLatentImage"))
    side_by_side = len(nodes_of(prompt, "LatentConcat")) + 1
    return len(lines) or drawn or 1, (128 * side_by_side, 128)


def source_of(prompt: dict, node_id: str) -> str:
    """The kind of node that a picture or mask comes from."""
    inputs = prompt[node_id]["inputs"]
    return prompt[inputs.get("images", inputs.get("mask"))[0]]["class_type"]


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_headless(client, name):
    prompt = shortened(api_form(name))
    provide_files(client, prompt)
    entry = client.queue(prompt)
    count, size = pictures_wanted(prompt)
    saved = [key for key, node in prompt.items() if node["class_type"] in ("SaveImage", "SaveAnimatedWEBP")]
    previews = [key for key, node in prompt.items() if node["class_type"] in ("PreviewImage", "MaskPreview")]
    assert {len(client.images(entry, key)) for key in saved} == {count}
    for node_id in [*saved, *previews]:
        for data in client.images(entry, node_id):
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            if source_of(prompt, node_id) in ("VAEDecode", "PalimpsestKeepOutside"):  # others are maps and plots
                assert picture.size == (size if node_id in saved else (128, 128))
            assert all(low < high for low, high in picture.getextrema()), "a picture of one colour"
