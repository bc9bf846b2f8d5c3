"""Keys and values from several origins: how they are joined, and what each mode does with them."""

import math

import pytest
import torch
from palimpsest.nodes.kv.embeddings import LEARNED, SOURCE
from palimpsest.nodes.kv.modes import MODES, Shown
from palimpsest.nodes.kv.tokens import Part, Tokens


def numbered(rows, tokens, first=0.0):
    """(rows, tokens, 1): each token its own number."""
    return torch.arange(first, first + rows * tokens).view(rows, tokens, 1)


def tokens_of(rows=2, tokens=3):
    return Tokens(numbered(rows, tokens), -numbered(rows, tokens))


def test_a_layers_own_tokens_are_handed_on_as_they_are():
    tokens = tokens_of()
    key, value, bias = tokens.joined(torch.zeros(2, 3, 1))
    assert key is tokens.own.key
    assert value is tokens.own.value
    assert bias is None


def test_added_tokens_stand_behind_the_layers_own_in_every_row():
    tokens = tokens_of()
    tokens.added.append(Part(torch.tensor([[[50.0], [51.0]]]), torch.tensor([[[60.0], [61.0]]])))
    key, value, bias = tokens.joined(torch.zeros(2, 3, 1))
    assert key[..., 0].tolist() == [[0, 1, 2, 50, 51], [3, 4, 5, 50, 51]]
    assert value[..., 0].tolist() == [[0, -1, -2, 60, 61], [-3, -4, -5, 60, 61]]
    assert bias is None


def test_tokens_that_are_replaced_are_left_out():
    tokens = tokens_of()
    tokens.replaced = True
    tokens.added.append(Part(numbered(2, 2, 50.0), numbered(2, 2, 60.0)))
    key, value, bias = tokens.joined(torch.zeros(2, 3, 1))
    assert key[..., 0].tolist() == [[50, 51], [52, 53]]
    assert value[..., 0].tolist() == [[60, 61], [62, 63]]
    assert bias is None


def test_a_bias_is_one_for_all_rows_or_one_for_each():
    shared = tokens_of()
    shared.added.append(Part(numbered(2, 2), numbered(2, 2), torch.tensor([[0.5, 0.25]])))
    assert shared.joined(torch.zeros(2, 4, 1))[2].tolist() == [[0, 0, 0, 0.5, 0.25]] * 4
    each = tokens_of()
    each.added.append(Part(numbered(2, 2), numbered(2, 2), torch.tensor([[0.5, 0.25]])))
    each.added.append(Part(numbered(2, 1), numbered(2, 1), torch.tensor([[1.0], [2.0]])))
    bias = each.joined(torch.zeros(2, 4, 1))[2]
    assert bias.shape == (2, 4, 6)
    assert bias[:, 3].tolist() == [[0, 0, 0, 0.5, 0.25, 1], [0, 0, 0, 0.5, 0.25, 2]]


def test_a_bias_on_the_only_tokens_is_kept():
    tokens = tokens_of()
    tokens.replaced = True
    tokens.added.append(Part(numbered(2, 2), numbered(2, 2), torch.tensor([[0.0, 1.0]])))
    assert tokens.joined(torch.zeros(2, 3, 1))[2].tolist() == [[0, 1]] * 3


def test_every_tile_looks_at_its_own_part_and_at_the_whole_source():
    tokens = tokens_of(rows=2, tokens=4)
    tokens.added.append(Part(numbered(2, 2, 50.0), numbered(2, 2, 60.0), torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
    key, value, bias = tokens.joined(torch.zeros(4, 2, 1))
    assert key[..., 0].tolist() == [[0, 1, 50, 51], [2, 3, 50, 51], [4, 5, 52, 53], [6, 7, 52, 53]]
    assert value[..., 0].tolist() == [[0, -1, 60, 61], [-2, -3, 60, 61], [-4, -5, 62, 63], [-6, -7, 62, 63]]
    assert bias[:, 0].tolist() == [[0, 0, 1, 2], [0, 0, 1, 2], [0, 0, 3, 4], [0, 0, 3, 4]]


def test_what_each_mode_reads_and_gives():
    assert {name: mode.needs for name, mode in MODES.items()} == {
        "extend": (SOURCE,),
        "recompute": (LEARNED,),
        "frozen": (LEARNED, SOURCE),
    }
    assert [name for name, mode in MODES.items() if mode.corresponds] == ["recompute"]
    assert [name for name, mode in MODES.items() if mode.longer] == ["extend"]


def test_extend_weighs_the_sources_keys_by_strength():
    tokens = tokens_of()
    bias = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    MODES["extend"].act(tokens, Shown(numbered(2, 2), numbered(2, 2), bias=bias), 0.5)
    torch.testing.assert_close(tokens.added[0].bias, bias + math.log(0.5))
    MODES["extend"].act(tokens, Shown(numbered(1, 2), numbered(1, 2)), 1.0)
    assert tokens.added[1].bias is None
    assert tokens.added[1].key.shape == (2, 2, 1)
    assert not tokens.replaced


def test_recompute_changes_the_layers_own_tokens_and_refuses_another_number():
    tokens = tokens_of(rows=1)
    shown = Shown(
        torch.full((1, 3, 1), 10.0), torch.full((1, 3, 1), 20.0), torch.full((1, 1, 1), 2.0), torch.zeros(1, 1, 1)
    )
    MODES["recompute"].act(tokens, shown, 0.5)
    assert tokens.own.key[..., 0].tolist() == [[5.0, 6.5, 8.0]]  # half of the way from k to 10 + 2 k
    assert tokens.own.value[..., 0].tolist() == [[10.0, 9.5, 9.0]]
    assert not tokens.added
    with pytest.raises(ValueError, match="learned 3 tokens for a layer that has 4 here"):
        MODES["recompute"].act(tokens_of(tokens=4), shown, 1.0)


def test_frozen_stands_in_the_place_of_the_layers_own_tokens():
    tokens, shown = tokens_of(rows=1), Shown(numbered(1, 3, 10.0), numbered(1, 3, 20.0))
    MODES["frozen"].act(tokens, shown, 0.5)
    assert tokens.replaced
    assert tokens.added[0].key[..., 0].tolist() == [[5.0, 6.0, 7.0]]
    assert tokens.added[0].value[..., 0].tolist() == [[10.0, 10.0, 10.0]]
    other = Shown(numbered(1, 2), numbered(1, 2))
    MODES["frozen"].act(tokens_of(), other, 1.0)
    with pytest.raises(ValueError, match=r"frozen at strength 0\.5 needs the tuned size"):
        MODES["frozen"].act(tokens_of(), other, 0.5)
