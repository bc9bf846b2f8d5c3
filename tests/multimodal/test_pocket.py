"""The pocket multimodal encoder of `dev.py bench multimodal`: its model, prompts, first targets and file."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import multimodal_pocket as learning
from palimpsest.kernels.connector import ConnectorConfig
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal.encoder import Connector, Reads, join
from palimpsest.nodes.multimodal.interleaved import Picture
from palimpsest.nodes.multimodal.vlm import load_vlm
from pocket import world
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return learning.write_vlm(tmp_path_factory.mktemp("pocket") / learning.VLM)


@pytest.fixture(scope="module")
def vlm(folder):
    return load_vlm(folder, "float32")


@pytest.fixture(scope="module")
def data():
    """Two drawn scenes; nothing here looks at latents."""
    scenes = [world.sample_scene(np.random.default_rng([learning.TRAINING_SEED, i])) for i in range(2)]
    return learning.Data(scenes, *learning.painted(scenes), torch.zeros(2, 4, 16, 16))


def prompt(data, tokens=16):
    return ("a ", Picture(data.animal(0), tokens), " dog sitting in ", Picture(data.place(0), tokens))


def test_every_word_of_a_caption_is_one_token(vlm):
    for scene in world.held_out_scenes(40):
        text = world.caption(scene)
        ids, _ = vlm.tokenised((text,))
        assert len(ids) == 1 + len(text.split())
        assert vlm.tokenizer.unk_token_id not in ids


def test_a_folder_that_holds_no_training_is_refused_in_a_sentence(tmp_path):
    shipped = Path(learning.__file__).parent.parent / "pocket" / "models"
    assert learning.trained_folder(str(shipped)) == shipped
    (tmp_path / learning.VLM).mkdir(parents=True)
    (tmp_path / learning.VLM / "model.safetensors").touch()
    for text, missing in ((str(tmp_path / "gone"), learning.VLM), (str(tmp_path), learning.CONNECTOR)):
        with pytest.raises(argparse.ArgumentTypeError, match=f"has no {missing}.*: give tests/pocket/models"):
            learning.trained_folder(text)


def test_a_pooled_picture_is_the_mean_of_its_tokens(vlm, data):
    prompts = [prompt(data), ("a dog",)]
    whole, pooled = vlm.hidden_states(prompts), learning.OneVector.of(vlm).hidden_states(prompts)
    _, animal, words, _ = whole.layouts[0]
    assert pooled.mask.sum(1).tolist() == [int(whole.mask[0].sum()) - 2 * 15, 3]
    assert [span.tokens for span in pooled.layouts[0]] == [2, 3, words.tokens, 3]
    torch.testing.assert_close(pooled.states[0, 3], whole.states[0, animal.start + 1 : animal.end - 1].mean(0))
    torch.testing.assert_close(pooled.states[0, 5 : 5 + words.tokens], whole.states[0, words.start : words.end])
    assert torch.equal(pooled.states[1, :3], whole.states[1, :3])


def test_what_a_picture_looks_like_can_be_read_off_its_tokens(vlm, data):
    states = [
        vlm.hidden_states([("a ", Picture(torch.full((32, 32, 3), level), 16))]).states[0, 3:19] for level in (0.2, 0.8)
    ]
    spread = (states[0] - states[0].mean(0)).norm(dim=1).mean()
    assert (states[0] - states[1]).norm(dim=1).mean() > 0.5 * spread


def test_lessons_hold_crops_of_the_very_picture_and_are_the_same_for_a_step(data):
    first, again = (learning.lesson(data, 3, learning.Recipe(), 0, {"64": 1.0}, batch=64) for _ in range(2))
    assert (first.captions, first.indices, first.seed) == (again.captions, again.indices, again.seed)
    empty = [made == () for made in first.prompts]
    assert 0 < sum(empty) < 20
    assert [caption == "" for caption in first.captions] == empty
    for index, made in zip(first.indices, first.prompts, strict=True):
        for number, part in enumerate(part for part in made if isinstance(part, Picture)):
            source = (data.animal(index), data.place(index))[number]
            assert set(map(tuple, part.pixels.flatten(0, 1).tolist())) <= set(map(tuple, source.flatten(0, 1).tolist()))
            assert part.tokens == 64


def test_the_place_is_shown_by_an_edge_without_the_animal(data):
    for index, scene in enumerate(data.scenes):
        mask = learning.edge(data.masks[index][..., None].float() / 255, scene)
        assert mask.mean() < 0.1


@pytest.fixture
def said(vlm, data, comfy_host_path):
    """(dictionary, a prompt's target and counts, its layout, an empty prompt's target) of the first scene."""
    dictionary = learning.Dictionary()
    before, behind = learning.told(data.scenes[0], place=False)
    made = (f"{before} ", Picture(data.animal(0), 16), f" {behind} ", Picture(data.place(0), 16))
    lesson = learning.Lesson("16", [0, 1], [made, ()], [world.caption(data.scenes[0]), ""], seed=0)
    hidden = vlm.hidden_states(lesson.prompts)
    target, counts = dictionary.target(hidden, lesson, data.scenes)
    return dictionary, target[0], counts[0], hidden.layouts[0], target[1]


def test_words_should_become_the_text_encoders_own_tokens(said, data):
    dictionary, target, counts, (_, _, text, _), nothing = said
    words = world.caption(data.scenes[0]).split()
    encoded, empty = dictionary.encoder([" ".join(words), ""])
    assert torch.equal(target[:2], encoded[:2])  # <s> a
    assert torch.equal(target[text.start : text.start + 3], encoded[3:6])  # species, pose, on
    torch.testing.assert_close(nothing[0], empty[1:].mean(0))
    assert set(counts[text.start : text.end].tolist()) == {1.0}


def test_pictures_should_become_a_colour_with_a_coat_and_a_place(said, data):
    dictionary, target, counts, (_, animal, _, place), _ = said
    scene = data.scenes[0]
    encoded = dictionary.encoder([world.caption(scene)])[0]
    last = len(world.caption(scene).split())
    for span, wanted in ((animal, encoded[2] + dictionary.coat(scene)), (place, encoded[last])):
        assert torch.equal(target[span.start : span.end], wanted.expand(span.tokens, -1))
        assert counts[span.start + 1 : span.end - 1].sum().item() == pytest.approx(learning.PICTURE)


def test_the_nearest_words_to_what_should_be_said_are_right_and_others_are_wrong(said, data):
    dictionary, target, _, (_, animal, _, _), _ = said
    tokens, scene = target[animal.start : animal.end], data.scenes[0]
    assert all(dictionary.heard(tokens, scene).values())
    other = world.edit(scene, colour="red" if scene.colour != "red" else "blue", collar=(scene.collar + 1) % 6)
    heard = dictionary.heard(tokens, other)
    assert {name for name, right in heard.items() if not right} == {"colour", "collar"}


def test_an_animal_without_a_second_colour_or_socks_says_none(said):
    dictionary = said[0]
    plain = world.edit(world.held_out_scenes(1)[0], species="bird", pattern="plain", socks=False, tailtip=False)
    assert torch.equal(dictionary.coat(plain), dictionary.coat(world.edit(plain, second=3, socks=True)))


def test_what_was_learned_is_a_models_folder_in_half_precision(vlm, data, tmp_path):
    config = ConnectorConfig(vlm.width, 768, depth=1, heads=12, mlp_ratio=1)
    connector = Connector.new(config, Reads.of(vlm, 64), seed=1)
    seeing = {name: tensor + 0.25 for name, tensor in vlm.model.state_dict().items() if "perceiver" not in name}
    learning.write_trained(tmp_path, seeing, connector, {"lora_unet_x.lora_up.weight": torch.randn(4, 2)})
    again = load_vlm(tmp_path / learning.VLM, "auto")
    assert json.loads((tmp_path / learning.VLM / "config.json").read_text()).get("dtype") in ("float16", None)
    for name, tensor in again.model.state_dict().items():
        if "perceiver" not in name:
            torch.testing.assert_close(tensor.float(), seeing[name], atol=2e-3, rtol=2e-3)
    encoder = join(again, multimodal_files.load_connector(str(tmp_path / learning.CONNECTOR)))
    assert encoder.require_connector().parameters == connector.parameters
    (lora,) = load_file(tmp_path / learning.LORA).values()
    assert lora.dtype == torch.float16
