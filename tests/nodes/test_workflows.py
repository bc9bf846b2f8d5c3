"""Every shipped workflow through the host's HTTP API, as a script or a service would queue it."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from shipped_workflows import API, WORKFLOWS, api_form, provide_files, shortened

NAMES = [path.stem for path in WORKFLOWS]


def nodes_of(prompt: dict, kind: str) -> list[dict]:
    return [node["inputs"] for node in prompt.values() if node["class_type"] == kind]


def test_every_workflow_has_its_api_form():
    assert NAMES
    assert sorted(path.stem for path in API.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_nodes_of_a_workflow_agree(name):
    """Noise that was found with some steps, schedule and guidance belongs to the same ones."""
    prompt = api_form(name)
    (inversion,) = nodes_of(prompt, "PalimpsestInvert")
    for sampler in nodes_of(prompt, "KSamplerAdvanced"):
        assert (sampler["steps"], sampler["scheduler"]) == (inversion["steps"], inversion["scheduler"])
        assert sampler["add_noise"] == "disable"
        assert sampler["sampler_name"] == "euler"
        for tuning in nodes_of(prompt, "PalimpsestTuneKV"):
            assert sampler["cfg"] == tuning["guidance"]


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_headless(client, name):
    prompt = shortened(api_form(name))
    provide_files(client, prompt)
    entry = client.queue(prompt)
    saved = [key for key, node in prompt.items() if node["class_type"] in {"SaveImage", "PreviewImage"}]
    assert saved
    for node_id in saved:
        (data,) = client.images(entry, node_id)
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        assert picture.size == (128, 128)
        assert all(low < high for low, high in picture.getextrema()), "a picture of one colour"
