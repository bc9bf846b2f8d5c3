"""The pocket's text control: what it learns from, how it begins, how it is stored, and how letters are measured."""

from __future__ import annotations

import pytest
import torch
from palimpsest.nodes.exact_text import fonts
from palimpsest.nodes.text_control import files
from pocket import checkpoint, signs, text_encoder, train
from text_control import inked, measuring, pocket_control, pocket_signs, pocket_training

LATENT = (1, 4, 16, 16)


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    """The fonts of the signs in the list, and out of it afterwards."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, fonts.FOLDER, ([], set(fonts.KINDS)))
    pocket_signs.register_fonts()
    yield
    folder_paths.filename_list_cache.pop(fonts.FOLDER, None)


@pytest.fixture(scope="module")
def begun():
    """A control as a training begins it, with something to say, and the U-Net."""
    unet, _ = checkpoint.load_weights(checkpoint.WEIGHTS / checkpoint.UNET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "import_host", lambda: None)  # it is, by these tests' own way
        return pocket_training.begun(unet, 0), pocket_training.frozen(unet)


def asked(drawn=0):
    generator = torch.Generator().manual_seed(drawn)
    context = torch.randn(1, 77, text_encoder.WIDTH, generator=generator)
    hint = torch.randn(1, 324, 16, 16, generator=generator)
    return {"x": torch.randn(LATENT, generator=generator), "t": torch.tensor([500]), "context": context, "hint": hint}


def test_what_is_measured_was_not_learned():
    scenes, learned = pocket_signs.held_out(3), [pocket_signs.scene_of(index) for index in range(6)]
    assert all(signs.is_held_out(scene.sign.text) for scene in scenes)
    assert not any(signs.is_held_out(scene.sign.text) for scene in learned)
    assert len({scene.sign.text for scene in scenes}) == 3 and all(pocket_signs.hidden(scene) == 0 for scene in scenes)
    assert all(scene.sign.size >= pocket_signs.SMALLEST for scene in scenes + learned)


def test_letters_are_told_where_they_stand():
    scene = pocket_signs.held_out(1)[0]
    lines = pocket_signs.lines_of(scene)
    told = torch.nn.functional.avg_pool2d(lines.glyphs[None], 2)[0, 0] > 0.5
    there = torch.from_numpy(signs.letters(scene.sign, pocket_signs.SIDE)) > 0.5
    assert (told & there).sum() > 0.5 * (told | there).sum()
    found = measuring.written(pocket_signs.drawn([scene])[0].movedim(0, -1), lines)
    assert found.exact == 1 and found.place > 0.8
    moved = pocket_signs.drawn([scene])[0].movedim(0, -1).roll(30, 0)
    away = measuring.written(moved, lines)
    assert away.exact == 0 and away.place < 0.3
    assert measuring.written(torch.full((128, 128, 3), 0.5), lines).place == 0


def test_a_control_begins_as_nothing(begun):
    network, unet = begun
    given = asked()
    alone = unet(given["x"], given["t"], context=given["context"])
    together = pocket_training.predict(
        unet, network, given["x"], given["t"], context=given["context"], hint=given["hint"]
    )
    assert torch.equal(alone, together)


def test_embeddings_stand_where_the_placeholder_does():
    encoder = pocket_training.Encoder()
    texts = ["a red cat with a sign that says  * ", "a dog"]
    star = encoder.tokens[encoder.star].float().repeat(2, 1)
    assert torch.allclose(encoder.embed(texts, star), encoder(texts), atol=1e-5)
    changed = encoder.embed(texts, star.flip(1))
    assert not torch.allclose(changed[0], encoder(texts)[0], atol=1e-2)
    assert torch.allclose(changed[1], encoder(texts)[1], atol=1e-5)
    first = pocket_control.first_projection(encoder.star)
    assert torch.equal(first["norm_bias"], star[0]) and first["weight"].shape == (text_encoder.WIDTH, files.NECK)


def test_what_is_stored_loads_as_a_control_of_the_full_width(begun, tmp_path):
    network, _ = begun
    state = {name: weight.clone() for name, weight in network.state_dict().items()}
    drawn = torch.Generator().manual_seed(3)
    state |= {
        name: 0.1 * torch.randn(weight.shape, generator=drawn)
        for name, weight in state.items()
        if name.startswith(("zero_convs.", "middle_block_out."))
    }
    projection = pocket_control.first_projection(265)
    pocket_control.save(tmp_path / "packed.safetensors", state, projection, {"steps": "7"})
    assert (tmp_path / "packed.safetensors").stat().st_size < 12e6
    pocket_control.write_full(tmp_path / "packed.safetensors", tmp_path / "full.safetensors")
    parts = files.read(str(tmp_path / "full.safetensors"))
    assert parts.info["steps"] == 7
    narrow, embedder = pocket_control.narrow(tmp_path / "packed.safetensors")
    full = files.control_of(parts).control_model
    given = asked(1)
    asking = {"x": given["x"], "hint": given["hint"], "timesteps": given["t"], "context": given["context"]}
    with torch.no_grad():
        one, two = narrow.control_model(**asking), full.float()(**asking)
    for few, many in zip(one["output"] + one["middle"], two["output"] + two["middle"], strict=True):
        assert torch.allclose(many[:, ::2], few, atol=0.02 * float(few.abs().max()))
        assert torch.allclose(many[:, ::2], many[:, 1::2], atol=1e-4)
    embedded = embedder.embed(strips())
    assert torch.allclose(files.embedder_of(parts).embed(strips()), embedded, atol=0.02)
    assert train.count_of(full) > 3 * train.count_of(narrow.control_model)


def strips():
    """A line by itself."""
    return pocket_signs.lines_of(pocket_signs.held_out(1)[0]).strips


def test_a_board_is_painted_over():
    picture = torch.zeros(128, 128, 3)
    picture[40:60, 30:90] = 1
    assert not measuring.without_board(picture, (37, 47, 83, 53)).any()


def test_ink_is_told_from_the_drawn_world(tmp_path):
    scenes = pocket_signs.held_out(2)
    plain, ink = pocket_signs.drawn(scenes).movedim(1, -1), inked.in_ink(scenes)
    assert inked.styled(ink, ink, plain) == {"ink": 1.0, "distance": 0.0}
    told = inked.styled(plain, ink, plain)
    assert told["ink"] == 0 and told["distance"] > 5
    kept = inked.file_of(tmp_path, 350)
    kept.touch()
    assert inked.learned((None, None, None), tmp_path, 350) == kept, "what is there is not learned again"
    with pytest.raises(SystemExit, match="each has 175 steps"):
        inked.learned((None, None, None), tmp_path, 300)
