"""Settings: filled by name, replaced by a preset."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from palimpsest.nodes.settings import Settings


@dataclass(frozen=True)
class Some(Settings):
    rate: float
    steps: int = 3

    PRESETS: ClassVar = {"paper": {"rate": 0.5}}


def test_fields_are_filled_by_the_ids_of_inputs():
    assert Some.of({"rate": 0.1, "steps": 7}) == Some(rate=0.1, steps=7)
    assert Some.of({"rate": 0.1}).named() == {"rate": 0.1, "steps": 3}


def test_a_preset_replaces_what_it_names_and_leaves_the_rest():
    assert Some.of({"preset": "paper", "rate": 0.1, "steps": 7}) == Some(rate=0.5, steps=7)
    assert Some.of({"preset": "as set below", "rate": 0.1}) == Some(rate=0.1)


def test_an_input_that_is_no_field_is_an_error():
    with pytest.raises(TypeError, match="rato"):
        Some.of({"rate": 1.0, "rato": 2.0})
