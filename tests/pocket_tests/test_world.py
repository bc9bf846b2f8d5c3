"""The pocket world: sampling, drawing, ideal edits, captions, parts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from pocket import signs, world

SCENES = world.held_out_scenes(24)
CONTACT_SHEET = Path(world.__file__).parent / "world.png"
SAMPLED = "a7e84858dadbd73f"  # start of the sha256 of the first 24 held-out scenes, as JSON


DRAWN = {  # seed -> start of the sha256 of a picture and of its mask, as they were before there were signs
    (1, 0): ("1d2cc6ace0e6aa0f", "78969c75873ee8af"),
    (1, 1): ("e630a1c6b6b102b6", "506b4710244f9007"),
    (77, 0): ("b8c0eb783eff87ae", "322987bb26a82e4e"),
    (77, 5): ("97a6940e8ee1745c", "44ed083e85e9448e"),
    (99, 3): ("3e578c95af019b1a", "f751cf133441e98a"),
    (7, 11): ("c7dffc7dd8e6d50c", "98b1640d11afa0d8"),
}


def start_of_hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_sampling_draws_the_scenes_the_model_was_trained_on():
    values = [dataclasses.asdict(scene) for scene in SCENES]
    assert all(each.pop("sign") is None for each in values)
    assert hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16] == SAMPLED


@pytest.mark.parametrize("seed", DRAWN)
def test_scenes_without_a_sign_are_drawn_as_ever(seed):
    """The same numbers bit for bit, where this machine rounds cos and hypot as the one that wrote them down."""
    picture, mask = world.render(world.sample_scene(np.random.default_rng(seed)), with_mask=True)
    if not drawn_like_the_stored_sheet():
        pytest.skip("this machine rounds cos or hypot otherwise; the contact sheet is compared to within one level")
    assert (start_of_hash(picture), start_of_hash(mask)) == DRAWN[seed]


@functools.cache
def drawn_like_the_stored_sheet() -> bool:
    image = pytest.importorskip("PIL.Image")
    return (np.asarray(image.open(CONTACT_SHEET)) == world.contact_sheet(world.readme_rows())).all()


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


# ----------------------------------------------------------------------------------------------------------- signs

SIGNED = world.held_out_signs(12)
RNG_SEED = 3


def test_a_sign_changes_nothing_else_in_the_scene():
    assert [dataclasses.replace(scene, sign=None) for scene in SIGNED] == SCENES[:12]
    assert world.held_out_signs(3) == SIGNED[:3]


@pytest.mark.parametrize("index", range(6))
def test_a_sign_changes_only_its_own_pixels(index):
    scene = SIGNED[index]
    changed = (world.render(scene) != world.render(world.edit(scene, sign=None))).any(-1)
    parts = world.render_parts(scene)
    assert changed.any()
    assert not (changed & (parts["post"] + parts["board"] == 0)).any()


@pytest.mark.parametrize("change", [{"pose": "jumping"}, {"species": "dog"}, {"colour": "blue"}])
def test_edit_keeps_the_sign_outside_the_animal(change):
    before, after = SIGNED[1], world.edit(SIGNED[1], **change)
    changed = (world.render(before) != world.render(after)).any(-1)
    parts = [world.render_parts(scene) for scene in (before, after)]
    assert not (changed & (sum(part["animal"] + part["shadow"] for part in parts) == 0)).any()


def test_letters_lie_on_the_board_and_in_their_box():
    for scene in SIGNED:
        (line,) = world.lines(scene)
        letters, board = (world.render_parts(scene)[name] for name in ("letters", "board"))
        assert (letters <= board + 1e-3).all()
        rows, columns = np.nonzero(letters > 0.5)
        left, top, right, bottom = np.array(line.box) * 128
        assert left - 1 <= columns.min() and columns.max() < right + 1
        assert top - 1 <= rows.min() and rows.max() < bottom + 1
        assert line.text == scene.sign.text


def test_letters_have_their_boards_letter_colour():
    for scene in SIGNED[:4]:
        sure = world.render_parts(scene)["letters"] > 0.999
        assert sure.any()
        assert np.abs(world.render(scene)[sure].astype(int) - signs.BOARD_RGB[scene.sign.board][1]).max() <= 2


def test_signs_are_readable_in_size_and_seldom_hidden():
    hidden = []
    for i in range(60):
        rng = np.random.default_rng([RNG_SEED, i])
        (scene,) = world.add_sign(rng, world.sample_scene(rng))
        assert 20 <= scene.sign.size * 128 <= 32
        assert 2 <= len(scene.sign.text) <= 5
        left, _, right, _ = world.lines(scene)[0].box
        assert 0 < left < right < 1
        free = world.render_parts(world.edit(scene, size=0.01, dx=5.0))["letters"].sum()
        hidden.append(1 - world.render_parts(scene)["letters"].sum() / free)
    assert np.mean(np.array(hidden) > 0.01) < 0.1


def test_two_scenes_of_one_animal_get_one_sign():
    pair = world.add_sign(np.random.default_rng(0), SCENES[0], world.edit(SCENES[0], pose="jumping"))
    assert pair[0].sign == pair[1].sign is not None


def test_training_never_shows_held_out_pairs_of_letters():
    rng = np.random.default_rng(0)
    assert not any(signs.is_held_out(signs.sample_text(rng)) for _ in range(200))
    assert all(signs.is_held_out(scene.sign.text) for scene in SIGNED)
    pairs = [signs.is_held_out(a + b) for a in signs.LETTERS for b in signs.LETTERS]
    assert np.mean(pairs) == pytest.approx(1 / 9, abs=0.01)


def test_texts_are_words_and_nonsense_of_both_scripts():
    rng = np.random.default_rng(1)
    texts = [signs.sample_text(rng) for _ in range(400)]
    words = {word for words in signs.WORDS.values() for word in words}
    assert np.mean([text in words for text in texts]) == pytest.approx(0.33, abs=0.12)
    assert np.mean([text[0] in signs.LETTERS for text in texts]) == pytest.approx(0.58, abs=0.1)
    assert {len(text) for text in texts} == {2, 3, 4, 5}


def test_every_letter_has_a_glyph_of_its_own():
    place = {"x": 0.5, "y": 0.3, "foot": 0.8}
    drawn = {start_of_hash(signs.letters(signs.make(letter, 0.25, **place), 64)) for letter in "".join(signs.FONTS)}
    assert len(drawn) == len(signs.LETTERS) + len(signs.CHARACTERS)


def test_a_letter_without_a_glyph_is_refused():
    with pytest.raises(ValueError, match="'7' is not among the letters"):
        signs.make("A7", 0.2, x=0.5, y=0.3, foot=0.8)


def test_rewriting_keeps_the_board():
    scene = world.edit(SIGNED[0], sign=signs.make("SHOP", 24 / 128, x=0.5, y=0.2, foot=0.75))
    after = world.rewrite(scene, "CAFE")
    assert after.sign.text == "CAFE"
    assert dataclasses.replace(after.sign, text="SHOP", size=scene.sign.size) == scene.sign
    changed = (world.render(scene) != world.render(after)).any(-1)
    left, top, right, bottom = np.array(world.lines(scene)[0].box) * 128
    rows, columns = np.nonzero(changed)
    margin = scene.sign.size * signs.MARGIN * 128
    assert left - margin < columns.min() and columns.max() < right + margin
    assert top - margin < rows.min() and rows.max() < bottom + margin


def test_rewriting_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="on a board made for 'NO'"):
        world.rewrite(world.edit(SIGNED[0], sign=signs.make("NO", 24 / 128, x=0.5, y=0.2, foot=0.75)), "PIZZA")
    with pytest.raises(ValueError, match="has no sign"):
        world.rewrite(SCENES[0], "PIZZA")


def test_signed_scene_survives_json():
    assert world.Scene.from_dict(json.loads(json.dumps(dataclasses.asdict(SIGNED[0])))) == SIGNED[0]


def test_captions_tell_the_text_of_a_sign():
    scene = world.edit(SIGNED[0], sign=signs.make("明月", 24 / 128, x=0.5, y=0.2, foot=0.75))
    assert world.caption(scene) == world.caption(SCENES[0]) + ' with a sign that says "明月"'
    rng = np.random.default_rng(1)
    ends = [world.training_caption(scene, rng).partition(" with a sign")[1:] for _ in range(300)]
    assert all(with_sign for with_sign, _ in ends)
    shares = {end: np.mean([e == end for _, e in ends]) for end in ("", " that says *", ' that says "明月"')}
    assert shares == pytest.approx({"": 0.1, " that says *": 0.1, ' that says "明月"': 0.8}, abs=0.06)


def test_training_captions_without_a_sign_draw_the_numbers_they_always_drew():
    rng, same = np.random.default_rng(5), np.random.default_rng(5)
    world.training_caption(SCENES[0], rng)
    same.random(3)
    assert rng.random() == same.random()
