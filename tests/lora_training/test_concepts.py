"""The benchmark's measures tell pictures with a concept from those without it, also behind the pocket's autoencoder."""

import pytest
import torch
from lora_training.benchmark import distance, shown
from lora_training.concepts import CONCEPTS, Lesson, within_coat
from pocket import autoencoder


@pytest.fixture(scope="module")
def model():
    return autoencoder.load()


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_concept_is_seen_where_it_is_and_only_there(model, concept):
    lesson = Lesson.of(CONCEPTS[concept], 1, 6)
    with_it, without = (autoencoder.round_trip(model, p) for p in (lesson.held_out, lesson.without))
    assert (shown(lesson.held_out, lesson), shown(lesson.without, lesson)) == (1.0, 0.0)
    assert (shown(with_it, lesson), shown(without, lesson)) == (1.0, 0.0)
    far, near = (distance(pictures, lesson.held_out, lesson.inside) for pictures in (without, with_it))
    assert near < 0.8 * far


def test_a_coat_is_compared_inside_it_alone():
    lesson = Lesson.of(CONCEPTS["zigzag"], 1, 3)
    coats = torch.stack([within_coat(scene, rim=0) for scene in lesson.scenes])
    elsewhere = torch.where(coats[..., None], lesson.held_out, 1 - lesson.held_out)
    assert distance(elsewhere, lesson.held_out, lesson.inside) == 0
    assert distance(elsewhere, lesson.held_out) > 1
    assert distance(lesson.without, lesson.held_out, lesson.inside) > 1
