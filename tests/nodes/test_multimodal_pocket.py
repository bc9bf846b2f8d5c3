"""The pocket multimodal encoder of `dev.py bench multimodal`: its model, prompts, first targets and file."""

import numpy as np
import pytest
import torch
from benchmarks import multimodal_pocket as learning
from palimpsest.kernels.reference.connector import ConnectorConfig
from palimpsest.nodes import multimodal_files
from palimpsest.nodes.patches import vision_language
from palimpsest.nodes.patches.interleaved import Picture
from palimpsest.nodes.patches.multimodal import Connector, Reads, join
from pocket import world
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return learning.write_vlm(tmp_path_factory.mktemp("pocket") / learning.VLM)


@pytest.fixture(scope="module")
def vlm(folder):
    return vision_language.load(folder, "float32")


@pytest.fixture(scope="module")
def data():
    """Two drawn scenes; nothing here looks at latents."""
    scenes = [world.sample_scene(np.random.default_rng([learning.TRAINING_SEED, i])) for i in range(2)]
    pictures, masks = zip(*(world.render(scene, with_mask=True) for scene in scenes), strict=True)
    masks = (torch.from_numpy(np.stack(masks)) * 255).round().byte()
    return learning.Data(scenes, torch.from_numpy(np.stack(pictures)), masks, torch.zeros(2, 4, 16, 16))


def prompt(data, tokens=16):
    return ("a ", Picture(data.animal(0), tokens), " dog sitting in ", Picture(data.place(0), tokens))


def test_every_word_of_a_caption_is_one_token(vlm):
    for scene in world.held_out_scenes(40):
        text = world.caption(scene)
        ids, _ = vlm.tokenised((text,))
        assert len(ids) == 1 + len(text.split())
        assert vlm.tokenizer.unk_token_id not in ids


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
    first, again = (learning.lesson(data, 3, learning.Recipe(batch=64), kinds={"64": 1.0}) for _ in range(2))
    assert first.captions == again.captions and first.indices == again.indices
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


@pytest.mark.usefixtures("comfy_host_path")
def test_the_first_targets_are_the_text_encoders_own_tokens(vlm, data):
    scene, dictionary = data.scenes[0], learning.Dictionary()
    before, behind = learning.told(scene)
    made = (f"{before} ", Picture(data.animal(0), 16), f" {behind}")
    caption = world.caption(scene)
    hidden = vlm.hidden_states([made, ()])
    target, counts = dictionary.target(hidden, [made, ()], [caption, ""])
    encoded, nothing = dictionary.encoder([caption, ""])
    words = caption.split()
    animal, text = hidden.layouts[0][1:3]
    assert torch.equal(target[0, :2], encoded[:2])  # <s> a
    assert torch.equal(target[0, animal.start], encoded[2])  # the colour
    torch.testing.assert_close(target[0, animal.start + 1], encoded[1 + len(words) :].mean(0))
    assert torch.equal(target[0, text.end - 1], encoded[len(words)])
    torch.testing.assert_close(target[1, 0], nothing[1:].mean(0))
    assert counts[0, animal.start + 1 : animal.end - 1].sum().item() == pytest.approx(learning.PICTURE)


def test_an_exported_file_holds_all_that_was_learned(folder, vlm, data, tmp_path):
    config = ConnectorConfig(vlm.width, 768, depth=1, heads=12, mlp_ratio=1)
    work = folder.parent
    multimodal_files.save(Connector.new(config, Reads.of(vlm, 64)), work / learning.CONNECTOR, torch.float16)
    save_file({"lora_unet_x.lora_up.weight": torch.randn(4, 2)}, work / learning.LORA)
    learning.export(work, tmp_path / "small.safetensors")
    learning.unpack(tmp_path / "small.safetensors", tmp_path / "again")
    size = sum((work / name).stat().st_size for name in (learning.CONNECTOR, learning.LORA))
    assert (tmp_path / "small.safetensors").stat().st_size < 0.7 * size
    found = []
    for place in (work, tmp_path / "again"):
        connector = multimodal_files.load(str(place / learning.CONNECTOR))
        encoder = join(vision_language.load(place / learning.VLM, "float32"), connector)
        found.append(connector(encoder.hidden_states([prompt(data)]).states)[0])
    assert (found[0] - found[1]).pow(2).mean() < 1e-3 * found[0].pow(2).mean()
    assert load_file(tmp_path / "again" / learning.LORA).keys() == {"lora_unet_x.lora_up.weight"}
