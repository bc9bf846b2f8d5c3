"""A source beside its edit: what is kept of it, which level serves which, and what a technique's patches are given."""

from types import SimpleNamespace

import pytest
import torch
from palimpsest.nodes import host
from palimpsest.nodes.host import reference
from palimpsest.nodes.host.call import Run, noise_level


class Wanted:
    """Two kinds of pieces: "a" above sigma 1, "b" above sigma 3."""

    name = "test"
    trajectory = SimpleNamespace(sigmas=(8.0, 4.0, 2.0, 0.5, 0.0))

    def kinds(self, sigma):
        return frozenset(kind for kind, above in (("a", 1.0), ("b", 3.0)) if sigma > above)


def recorded(sigma):
    """What is kept of a batch of two at a level."""
    pieces = {kind: torch.full((2, 3, 4), sigma) for kind in sorted(Wanted().kinds(sigma))}
    return reference.Level.of(sigma, pieces | {"mask": torch.arange(10.0).view(2, 5)})


CACHED = reference.Cached(tuple(recorded(sigma) for sigma in (8.0, 4.0, 2.0)))


def step(sigma):
    return reference.Step(None, torch.zeros(2, 1, 1, 1), torch.tensor([sigma]), sigma, {"transformer_options": {}})


def test_pieces_of_a_level_come_back_as_they_were():
    level = recorded(8.0)
    assert level.piece.shape == (2, 12 + 12 + 5)
    pieces = level.views(level.piece)
    assert list(pieces) == ["a", "b", "mask"]
    assert torch.equal(pieces["b"], torch.full((2, 3, 4), 8.0))
    assert torch.equal(pieces["mask"], torch.arange(10.0).view(2, 5))
    assert CACHED.bytes == 4 * 2 * (29 + 29 + 17)


def test_levels_at_which_something_is_wanted():
    assert reference.source_levels(Wanted()) == (8.0, 4.0, 2.0)


@pytest.mark.parametrize(("sigma", "level"), [(20.0, 8.0), (7.0, 8.0), (4.0, 4.0), (3.1, 4.0), (2.6, 2.0), (1.1, 2.0)])
def test_the_nearest_level_serves_that_has_what_is_wanted(sigma, level):
    """3.1 is wanted with "b", and nearer to 4 than to 2 as ratios go; 2.9 would do without."""
    pieces = CACHED.at(Wanted(), reference.Held(), step(sigma))
    assert float(pieces["a"][0, 0, 0]) == level


def test_a_nearer_level_without_what_is_wanted_does_not_serve():
    wanted = Wanted()
    cached = reference.Cached((recorded(8.0), recorded(2.9)))
    assert set(cached.at(wanted, reference.Held(), step(3.1))) >= wanted.kinds(3.1)


def test_the_next_level_is_sent_on_its_way_and_one_in_use_is_not_fetched_again():
    fetched, held = [], reference.Held()

    def fetch(wanted, coming, device):
        fetched.append((list(wanted), list(coming)))
        return wanted

    held.stream = SimpleNamespace(fetch=fetch)
    for sigma in (8.0, 8.0, 7.9, 4.0, 2.0):
        CACHED.at(Wanted(), held, step(sigma))
    assert fetched == [([0], [1]), ([1], [2]), ([2], [])]


def test_in_a_pass_of_the_source_no_other_technique_finds_a_step():
    ours, theirs = reference.source_name("one"), reference.source_name("two")
    call = reference.Step(None, None, None, 1.0, {"transformer_options": {theirs: "theirs", "another pack": 1}, "x": 2})
    edit, source = (call.options_with(ours, "ours", alone=alone) for alone in (False, True))
    assert edit == {"transformer_options": {theirs: "theirs", "another pack": 1, ours: "ours"}, "x": 2}
    assert source == {"transformer_options": {"another pack": 1, ours: "ours"}, "x": 2}


def test_the_sources_prompt_is_without_what_belongs_to_the_edit():
    tensor = torch.zeros(1, 3, 4)
    kept = {"pooled_output": None, "concat_mask": 1}
    prompt = [[tensor, kept | {"control": 1, "hooks": 2, "gligen": 3, "additional_models": 4}]]
    assert reference.source_prompt(prompt) == [[tensor, kept]]
    for area in ({"area": (1, 1, 0, 0)}, {"set_area_to_bounds": True}):
        with pytest.raises(ValueError, match="describes the whole picture, this one is limited to an area"):
            reference.source_prompt([[tensor, area]])


def test_a_noise_level_is_read_once_for_all_wrappers_of_a_call():
    timestep, options = torch.tensor([3.0]), {"transformer_options": {}}
    sigma, known = noise_level(timestep, options)
    assert sigma == 3.0 and options == {"transformer_options": {}}
    timestep.fill_(5.0)  # who reads it again would see this
    assert noise_level(timestep, known) == (3.0, known)
    assert noise_level(torch.tensor([4.0]), known)[0] == 4.0  # another call's


def test_two_nodes_hold_their_own_things_in_a_run():
    run, names = Run(), [host.source_name("one") for _ in range(2)]
    held = [reference.held_of(run, SimpleNamespace(name=name)) for name in (*names, names[0])]
    assert held[0] is held[2] is not held[1]
