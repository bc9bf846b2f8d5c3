"""Every shipped workflow through the host's HTTP API, as a script or a service would queue it."""

from __future__ import annotations

import pytest
from graphs.shipped import (
    API,
    MAKES_TUNING,
    WORKFLOWS,
    api_form,
    check_pictures,
    files_wanted,
    nodes_of,
    provide_files,
    shortened,
)

NAMES = [path.stem for path in WORKFLOWS]


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


@pytest.mark.runs_in_browser
@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_headless(client, name):
    prompt = api_form(name)
    provide_files(client, prompt)
    check_pictures(client, prompt, client.queue(shortened(prompt)))
