"""The language model of the pocket world: its words, its folder, and what it says where it was trained."""

import numpy as np
import pytest
import torch
from instruction import benchmark, pocket_head, pocket_language
from instruction_training import pocket_triples
from palimpsest.nodes.instruction import llava
from palimpsest.nodes.instruction.wording import QUESTION, asked
from pocket import world
from pocket.train import Captions

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def words():
    return pocket_language.tokenizer()


def test_it_knows_every_word_and_its_prompts_leave_room_for_an_answer(words):
    model = llava.MgieModel("pocket", pocket_language.configuration(words), None, words)
    for each in pocket_triples.held_out(200):
        prompt = model.tokens(model.prompt(asked(QUESTION, each.instruction)))
        said = words(each.expressed, add_special_tokens=False)["input_ids"]
        assert words.unk_token_id not in (*prompt, *said)
        assert words.decode(said) == each.expressed
        assert len(prompt) + 96 <= pocket_language.TEXT["max_position_embeddings"]


def test_what_is_taught_is_the_ideal_edit_of_the_scene_that_is_seen():
    rng, scene = np.random.default_rng(0), pocket_triples.triple(0).source
    mirrored = pocket_language.turned(scene)
    assert mirrored.side != scene.side and world.caption(mirrored) != world.caption(scene)
    told = dict(pocket_language.instructed(mirrored, rng) for _ in range(200))
    assert told["move it to the other side"] == world.caption(scene)
    assert world.PLACE_PHRASES["snow"] in told["make it winter"]


def test_a_folder_of_it_is_one_of_load_mgie(words, tmp_path):
    torch.manual_seed(0)
    config = pocket_language.configuration(words)
    network = llava.Llava(config, torch.nn)
    pocket_language.write(tmp_path / pocket_language.NAME, network, words, config)
    triples = pocket_triples.held_out(2)
    texts, head = benchmark.expressed(benchmark.language_model(tmp_path), triples)
    assert len(texts) == len(head.readings) == 2 and head.network is None


def test_masks_are_where_the_ideal_edit_differs():
    for each in pocket_triples.held_out(8):
        (source, edited), _ = benchmark.drawn([each.source, each.edited])
        outside = benchmark.ideal_mask(each)[0] == 0
        assert outside.any() and (source - edited).abs().amax(-1)[outside].max() < 0.02


@pytest.mark.skipif(not (benchmark.MODELS / pocket_language.NAME).exists(), reason="no trained one lies here")
def test_the_trained_one_says_what_scenes_become_that_it_never_saw(tmp_path):
    triples = pocket_triples.held_out(12)
    texts, _ = benchmark.expressed(benchmark.language_model(tmp_path), triples)
    assert sum(text == each.expressed for text, each in zip(texts, triples, strict=True)) >= 6


@pytest.mark.skipif(
    not (benchmark.MODELS / pocket_language.NAME / pocket_head.NAME).exists(), reason="no head lies here"
)
def test_the_trained_edit_head_says_what_the_text_encoder_says(tmp_path):
    """The prompt of a text is nearest to the text encoder's of the same text, among those of scenes it never saw."""
    triples = pocket_triples.held_out(12)
    texts, head = benchmark.expressed(benchmark.language_model(tmp_path), triples)
    made = head.prompts(torch.stack([reading.states for reading in head.readings]))
    wanted = Captions()(texts).float()
    nearest = torch.cdist(made.flatten(1), wanted.flatten(1)).argmin(1)
    assert sum(texts[number] == texts[row] for row, number in enumerate(nearest.tolist())) >= 9
