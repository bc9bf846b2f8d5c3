"""The pocket world: sampling, drawing, ideal edits, captions, parts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from pocket import world

SCENES = world.held_out_scenes(24)
CONTACT_SHEET = Path(world.__file__).parent / "world.png"
SAMPLED = "a7e84858dadbd73f"  # start of the sha256 of the first 24 held-out scenes, as JSON


def test_sampling_draws_the_scenes_the_model_was_trained_on():
    text = json.dumps([dataclasses.asdict(scene) for scene in SCENES])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == SAMPLED


def test_a_longer_list_of_held_out_scenes_begins_like_a_shorter_one():
    assert world.held_out_scenes(3) == SCENES[:3]


def test_drawing_matches_the_stored_contact_sheet():
    """One level of difference is another machine's rounding of cos and hypot."""
    image = pytest.importorskip("PIL.Image")
    stored = np.asarray(image.open(CONTACT_SHEET)).astype(int)
    drawn = world.contact_sheet(world.readme_rows()).astype(int)
    assert drawn.shape == stored.shape
    assert np.abs(drawn - stored).max() <= 1
    assert np.abs(drawn - stored).mean() < 1e-3


def test_drawing_is_repeatable_and_leaves_no_state():
    first = [world.render(scene) for scene in SCENES[:4]]
    world.render_parts(SCENES[5])
    assert all((world.render(scene) == picture).all() for scene, picture in zip(SCENES[:4], first, strict=True))


@pytest.mark.parametrize("size", [32, 65, 128])
def test_any_size_can_be_drawn(size):
    picture, mask = world.render(SCENES[0], size, with_mask=True)
    assert (picture.shape, picture.dtype) == ((size, size, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((size, size), np.float32)
    assert 0 <= mask.min() <= mask.max() <= 1


def test_supersampling_changes_edges_only():
    plain, fine = world.render(SCENES[0], 64).astype(int), world.render(SCENES[0], 64, supersample=4).astype(int)
    assert np.abs(plain - fine).mean() < 3


def test_second_colour_always_shows():
    for i in range(300):
        scene = world.sample_scene(np.random.default_rng([4, i]))
        first, second = (np.array(c) for c in (world.COAT_RGB[scene.colour], world.SECOND_RGB[scene.second]))
        assert np.abs(first - second).max() > 30, scene


def test_fixed_fields_are_kept():
    scene = world.sample_scene(np.random.default_rng(0), species="bird", pose="jumping", collar=3)
    assert (scene.species, scene.pose, scene.collar) == ("bird", "jumping", 3)


def test_scene_survives_json():
    scene = SCENES[0]
    assert world.Scene.from_dict(json.loads(json.dumps(dataclasses.asdict(scene)))) == scene


# --------------------------------------------------------------------------------------------------------- edits


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("change", [{"pose": "lying"}, {"pose": "jumping"}, {"species": "dog"}, {"facing": -1}])
def test_edit_keeps_every_pixel_outside_the_animal_and_its_shadow(index, change):
    before = SCENES[index]
    after = world.edit(before, **change)
    changed = np.abs(world.render(before).astype(int) - world.render(after).astype(int)).max(-1) > 0
    parts = [world.render_parts(scene) for scene in (before, after)]
    allowed = sum(part["animal"] + part["shadow"] for part in parts) > 0
    assert not (changed & ~allowed).any()


def test_edit_keeps_identity_and_background_fields():
    after = world.edit(SCENES[0], pose="jumping", place="snow")
    same = {f.name for f in dataclasses.fields(world.Scene)} - {"pose", "place"}
    assert all(getattr(after, name) == getattr(SCENES[0], name) for name in same)


def test_edit_refuses_what_does_not_exist():
    with pytest.raises(ValueError, match="no 'posture'"):
        world.edit(SCENES[0], posture="lying")
    with pytest.raises(ValueError, match="pose cannot be 'flying'"):
        world.edit(SCENES[0], pose="flying")


# ---------------------------------------------------------------------------------------------------------- parts


def test_parts_lie_inside_the_animal_and_do_not_overlap():
    for scene in SCENES[:8]:
        parts = world.render_parts(scene)
        covered = sum(parts[kind] for kind in world.PART_KINDS)
        assert covered.max() <= 1 + 1e-5
        assert (covered <= parts["animal"] + 1e-3).all()
        assert parts["collar"].sum() > 10


def test_animal_of_the_parts_is_the_mask_of_the_picture():
    _, mask = world.render(SCENES[1], with_mask=True)
    assert (world.render_parts(SCENES[1])["animal"] == mask).all()


def test_collar_is_where_the_collars_colour_is():
    scene = world.edit(SCENES[0], collar=1)
    sure = world.render_parts(scene)["collar"] > 0.999
    assert sure.any()
    assert np.abs(world.render(scene)[sure].astype(int) - world.COLLAR_RGB[1]).max() <= 2


def test_second_colour_is_where_it_is_painted():
    scene = world.edit(SCENES[0], species="cat", colour="red", pattern="patch", second=0)
    sure = world.render_parts(scene)["second"] > 0.999
    assert sure.sum() > 20
    assert np.abs(world.render(scene)[sure].astype(int) - world.SECOND_RGB[0]).max() <= 2


def test_a_plain_animal_has_no_second_colour():
    scene = world.edit(SCENES[0], species="cat", pattern="plain", socks=False, tailtip=False)
    assert world.render_parts(scene)["second"].max() == 0


# -------------------------------------------------------------------------------------------------------- captions


def test_caption():
    scene = world.sample_scene(
        np.random.default_rng(0), species="cat", colour="red", pose="sitting", side="left", place="night"
    )
    assert world.caption(scene) == "a red cat sitting on the left at night"


def test_training_captions_drop_words_but_never_the_animal_or_its_pose():
    rng, scene = np.random.default_rng(1), SCENES[0]
    captions = [world.training_caption(scene, rng) for _ in range(400)]
    assert all(caption.startswith("a ") and f"{scene.species} {scene.pose}" in caption for caption in captions)
    told = {
        "colour": np.mean([scene.colour in c for c in captions]),
        "side": np.mean([f"on the {scene.side}" in c for c in captions]),
        "place": np.mean([world.PLACE_PHRASES[scene.place] in c for c in captions]),
    }
    assert told == pytest.approx({"colour": 0.88, "side": 0.75, "place": 0.85}, abs=0.07)  # 3 standard errors


def test_captions_never_tell_the_hidden_identity():
    scene = SCENES[0]
    for name, values in world.HIDDEN.items():
        assert len({world.caption(world.edit(scene, **{name: value})) for value in values}) == 1
