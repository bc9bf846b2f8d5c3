"""What InstructPix2Pix is told in `dev.py bench rivals`."""

import pytest
from benchmarks.scenes import KINDS, another
from instruction_training import pocket_triples
from pocket import world
from rivals.instruct_pix2pix import instruction


@pytest.mark.parametrize("kind", KINDS)
def test_an_instruction_is_one_of_the_trainings(kind):
    """Word for word, but that a triple takes other scenes."""
    scenes = [pocket_triples.triple(index).source for index in range(40)]
    said = {instruction(scene, world.edit(scene, **{kind: another(scene, kind, i)})) for i, scene in enumerate(scenes)}
    taught = {pocket_triples.triple(index).instruction for index in range(3000)}
    assert said <= taught


def test_nothing_is_asked_for_where_nothing_changes():
    (scene,) = world.held_out_scenes(1)
    assert instruction(scene, scene) == ""
