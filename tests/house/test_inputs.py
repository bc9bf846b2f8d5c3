"""Inputs that several nodes have: their ranges, and the one error of each check."""

from types import SimpleNamespace

import pytest
from palimpsest.nodes import inputs


def test_percents_are_shares_of_the_whole_sampling():
    start, end = inputs.percents("When it begins.", "When it ends.", advanced=True)
    assert (start.id, end.id) == ("start_percent", "end_percent")
    assert (start.default, end.default) == (0.0, 1.0)
    assert all((item.min, item.max, item.advanced) == (0.0, 1.0, True) for item in (start, end))
    assert (start.tooltip, end.tooltip) == ("When it begins.", "When it ends.")


def test_a_seed_has_64_bits():
    seed = inputs.seed("The seed.")
    assert (seed.id, seed.min, seed.max) == ("seed", 0, 2**64 - 1)


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (1.0, []), (3.0, [])])
def test_a_prompt_to_lead_away_from_is_enough(guidance, negative):
    inputs.require_negative(guidance, negative)


@pytest.mark.parametrize("guidance", [0.0, 3.5])
def test_guidance_without_a_negative_prompt_is_refused(guidance):
    with pytest.raises(ValueError, match=f"guidance is {guidance:g}: .* needs the negative prompt; connect one"):
        inputs.require_negative(guidance, None)


def test_another_architecture_is_refused_in_the_words_of_the_caller(monkeypatch):
    monkeypatch.setattr(inputs.host, "same_layout", lambda model, layout: layout == "this")
    inputs.require_same_layout(None, "this", "the picture was inverted", "invert it again")
    with pytest.raises(
        ValueError, match=r"the picture was inverted with another model architecture: invert it again\."
    ):
        inputs.require_same_layout(None, "other", "the picture was inverted", "invert it again")


def test_another_prompt_is_noted(monkeypatch):
    monkeypatch.setattr(inputs.host, "conditioning_fingerprint", lambda positive: positive[0])
    trajectory = SimpleNamespace(prompt="a cat")
    assert inputs.prompt_note(trajectory, ["a cat"]) == ""
    assert inputs.prompt_note(trajectory, ["a dog"]).startswith("; note: the prompt differs")
