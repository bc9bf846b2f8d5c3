"""Settings: filled by name, replaced by a preset; in every node each input's value arrives under the input's name."""

import asyncio
import inspect
from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import MagicMock

import pytest
from comfy_api.latest import io
from palimpsest.nodes.extension import Palimpsest
from palimpsest.nodes.settings import Settings
from palimpsest.nodes.text_control import nodes as text_control

NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(Palimpsest().get_node_list())}
# They look at what is connected first, or have no settings: a value or two that are passed by name.
APART = {
    "PalimpsestInvert", "PalimpsestTrainLoRA",  # tests/inversion and tests/lora_training have the same test of them
    "PalimpsestSaveKV", "PalimpsestLoadKV", "PalimpsestSaveBlendWeights", "PalimpsestLoadBlendWeights",
    "PalimpsestSaveContextAdapter", "PalimpsestLoadContextAdapter", "PalimpsestLoadAnyText",
    "PalimpsestPromptLines", "PalimpsestSelectWords", "PalimpsestTextPrompt", "PalimpsestEditReport",
}  # fmt: skip
WIDGETS = (io.Combo.Input, io.Boolean.Input, io.Int.Input, io.Float.Input, io.String.Input)


@dataclass(frozen=True)
class Some(Settings):
    rate: float
    steps: int = 3

    PRESETS: ClassVar = {"paper": {"rate": 0.5}}


class Arrived(Exception):
    """Settings are being made: of what."""


def test_fields_are_filled_by_the_ids_of_inputs():
    assert Some.of({"rate": 0.1, "steps": 7}) == Some(rate=0.1, steps=7)
    assert Some.of({"rate": 0.1}).named() == {"rate": 0.1, "steps": 3}


def test_a_preset_replaces_what_it_names_and_leaves_the_rest():
    assert Some.of({"preset": "paper", "rate": 0.1, "steps": 7}) == Some(rate=0.5, steps=7)
    assert Some.of({"preset": "as set below", "rate": 0.1}) == Some(rate=0.1)


def test_an_input_that_is_no_field_is_an_error():
    with pytest.raises(TypeError, match="rato"):
        Some.of({"rate": 1.0, "rato": 2.0})


@pytest.mark.parametrize("node_id", sorted(NODES.keys() - APART))
def test_every_value_of_a_node_arrives_under_its_own_name(node_id, monkeypatch):
    """All values differ; those that are no settings are parameters of `execute`, by name."""

    def of(cls, chosen):
        raise Arrived(dict(chosen))

    monkeypatch.setattr(Settings, "of", classmethod(of))
    monkeypatch.setattr(text_control, "require_text_control", lambda control: None)
    node, schema = NODES[node_id].__base__, NODES[node_id].GET_SCHEMA()
    values = {each.id: f"the value of {each.id}" for each in schema.inputs if isinstance(each, WIDGETS)}
    given = {each.id: values.get(each.id) or MagicMock() for each in schema.inputs}
    if schema.is_input_list:
        given = {name: [value] for name, value in given.items()}
    with pytest.raises(Arrived) as arrived:
        node.execute(**given)
    (chosen,) = arrived.value.args
    assert chosen == {name: values[name] for name in chosen}
    assert values.keys() - chosen.keys() <= inspect.signature(node.execute).parameters.keys()
