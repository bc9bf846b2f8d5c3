"""What `dev.py bench multimodal --ablation copies` trains with, and how it measures what was pasted."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks import multimodal_pocket as learning
from pocket import judge as judging
from pocket import world

pytestmark = pytest.mark.usefixtures("inference")
RECIPE = learning.Recipe(by_picture=0.0)


@pytest.fixture(scope="module")
def copies(comfy_host_path):
    from multimodal import copies

    return copies


@pytest.fixture(scope="module")
def arms(copies):
    """The same three scenes for every arm."""
    scenes = [world.sample_scene(np.random.default_rng([learning.TRAINING_SEED, i])) for i in range(3)]
    given = learning.painted(scenes)
    return {name: arm(scenes, *given, torch.zeros(3, 4, 16, 16)) for name, arm in copies.ARMS.items()}


def test_arms_learn_the_same_scenes_in_the_same_order(arms):
    for step in range(4):
        lessons = [learning.lesson(data, step, RECIPE, 0, {"64": 0.9, "words": 0.1}) for data in arms.values()]
        assert len({(each.kind, *each.indices) for each in lessons}) == 1


def test_the_box_of_the_very_picture_has_its_background_and_is_varied_one_time_in_five(arms):
    same, rng = arms["same"].shown(0, np.random.default_rng(0)), np.random.default_rng(1)
    whole = arms["same"].pictures[0].float() / 255
    height, width = same.shape[:2]
    windows = whole.unfold(0, height, 1).unfold(1, width, 1).permute(0, 1, 3, 4, 2)
    assert (windows == same).flatten(2).all(-1).any()
    varied = [arms["varied"].shown(0, rng) for _ in range(200)]
    changed = [each for each in varied if not (each.shape == same.shape and torch.equal(each, same))]
    assert 25 < len(changed) < 55


def test_another_picture_shows_the_same_animal_in_another_pose(arms, copies):
    scene, rng = arms["another"].scenes[0], np.random.default_rng(2)
    others = [copies.elsewhere(scene, rng) for _ in range(40)]
    same = ("species", "colour", "tint", "pattern", "second", "collar", "socks", "tailtip", "facing", "size")
    assert all(getattr(other, name) == getattr(scene, name) for other in others for name in same)
    assert {other.pose for other in others} == set(world.POSES) - {scene.pose}
    assert {other.side for other in others} == set(world.SIDES)
    assert {other.place for other in others} == set(world.PLACES)


def test_what_was_pasted_fits_anywhere_and_mirrored_and_what_was_drawn_anew_does_not(copies):
    scenes = world.held_out_scenes(3)
    pictures, masks = (t.float() / 255 for t in learning.painted(scenes))
    soft = (masks >= 0.5).float()[..., None]
    moved = torch.roll(pictures * soft + 0.5 * (1 - soft), (-2, 3), (1, 2))
    found = copies.pasted(moved, pictures, (masks >= 0.5).float())
    assert (found > 90).all()
    assert (copies.pasted(moved.flip(2), pictures, (masks >= 0.5).float()) > 90).all()
    anew = torch.stack([torch.from_numpy(world.render(copies.elsewhere(s, np.random.default_rng(0)))) for s in scenes])
    assert (copies.pasted(anew.float() / 255, pictures, masks) < 25).all()


def test_the_multimodal_score_is_highest_for_the_same_animal_and_nothing_without_one(copies):
    judge = judging.load()
    embed, scenes = copies.judged(judge), world.held_out_scenes(8)
    pictures, masks = (t.float() / 255 for t in learning.painted(scenes))
    given = [copies.boxed(*pair) for pair in zip(*learning.painted(scenes), strict=True)]
    same = copies.similarity(embed, pictures, masks, given)
    strangers = copies.similarity(embed, pictures.roll(1, 0), masks.roll(1, 0), given)
    assert same == pytest.approx(100, abs=1e-3) and strangers < 90
    assert copies.similarity(embed, pictures, torch.zeros_like(masks), given) == 0


def test_the_place_of_one_picture_is_the_animals_own(copies):
    from multimodal import benchmark, findings

    for question in benchmark.questions(benchmark.FIRST, 3):
        home = findings.at_home(question)
        assert (home.answer.place, home.answer.horizon) == (question.source.place, question.source.horizon)
        assert (home.answer.pose, home.answer.side) == (question.answer.pose, question.answer.side)
        assert home.answer.place != question.answer.place and not torch.equal(home.place, question.place)


def test_the_fine_tune_of_finding_4_is_taught(copies, monkeypatch):
    """One step in place of hundreds, by the benchmark of LoRAs."""
    from benchmarks import pocket_host
    from multimodal import findings

    monkeypatch.setattr(findings, "INK", argparse.Namespace(pictures=1, repeats=1, epochs=1, rate=5.0))
    model, clip, vae = pocket_host.load_pocket()
    tuned = findings.fine_tuned(SimpleNamespace(plain=model, clip=clip, vae=vae))
    assert tuned.patches and not model.patches
