"""Which pictures Build Multimodal Dataset leaves out, and how often those with people come in a training."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import folder_paths
import pytest
import tiny_models
import torch
from multimodal.test_dataset import CAPTION, build, masks
from palimpsest.nodes.multimodal.dataset import STAGES, Crop, Dataset, Recipe, Record, filters, read_dataset
from palimpsest.nodes.multimodal.dataset.filters import Limits, PictureFilter
from palimpsest.nodes.multimodal.dataset.finders import Found
from palimpsest.nodes.multimodal.training.lessons import Lessons
from palimpsest.nodes.multimodal.training.settings import TrainSettings

FIRST, SECOND = STAGES

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def pictures(count, **kwargs):
    """As many pictures that are not like one another."""
    return [tiny_models.picture(1, seed=seed, **kwargs) for seed in range(count)]


def built(images, **values):
    return build(images=images, captions=[CAPTION] * len(images), masks=[masks()] * len(images), **values)


def kept(dataset):
    return [record.picture for record in dataset.records]


def files(*numbers):
    return [f"pictures/{number:05}.png" for number in numbers]


# ---- what is left out


def test_at_the_defaults_every_picture_is_taken():
    picture = tiny_models.picture(1)
    dataset, _, report = built([picture, picture, picture[:, :12, :40]])
    assert kept(dataset) == files(1, 2, 3)
    assert "left out" not in report and "people, which" not in report
    assert PictureFilter(Limits()).reason(0, torch.zeros(1, 400, 3), "") is None


@pytest.mark.parametrize(
    ("values", "wanted", "told"),
    [
        ({"min_picture": 30}, files(1, 3, 4), "1 smaller than 30 px"),
        ({"max_aspect": 2.0}, files(1, 3, 4), "1 longer than 2 : 1"),
        ({"alike_bits": 3}, files(1, 2, 4), "1 like an earlier one (fewer than 3 bits)"),
        ({"min_score": 0.5, "scores": [0.9, 0.5, 0.4, 0.2]}, files(1, 2), "2 scored below 0.5"),
        ({"min_picture": 30, "alike_bits": 3}, files(1, 4), "1 smaller than 30 px, 1 like an earlier one"),
    ],
)
def test_pictures_are_left_out_and_counted_by_their_reason(values, wanted, told):
    first, other = pictures(2)
    again = torch.nn.functional.interpolate(first.movedim(-1, 1), scale_factor=2.0, mode="bilinear").movedim(1, -1)
    images = [first, tiny_models.picture(1, 20, 64, seed=5), again * 0.9, other]
    dataset, _, report = built(images, **values)
    assert kept(dataset) == wanted
    assert f"left out: {told}" in report


def test_text_is_found_by_masks_of_it_or_by_the_detector(monkeypatch):
    texts = torch.zeros(2, 32, 32)
    texts[1, :8] = 1  # a quarter
    for limit, wanted in ((0.2, files(1)), (0.25, files(1, 2))):
        assert kept(built(pictures(2), text_masks=[texts], max_text=limit)[0]) == wanted

    def detect(picture, text, *thresholds):
        assert (text, thresholds) == (filters.TEXT, (0.4, 0.3))
        return [SimpleNamespace(box=(0.0, 0.0, 0.5, 0.5)), SimpleNamespace(box=(0.25, 0.0, 0.75, 0.5))]

    finder = SimpleNamespace(detector=SimpleNamespace(detect=detect), box_threshold=0.4, text_threshold=0.3)
    share = filters.chosen_text(Limits(max_text=0.2), [], finder)
    assert share(0, torch.zeros(40, 80, 3), "") == pytest.approx(0.375)  # what two boxes cover together
    assert filters.chosen_text(Limits(), [texts], finder) is None


def test_a_picture_that_was_left_out_hides_no_other():
    keep, picture = PictureFilter(Limits(alike_bits=3)), pictures(1)[0][0]
    assert [keep.reason(i, picture, "") for i in range(2)] == [None, None]
    keep.remember(picture)
    assert "like an earlier one" in keep.reason(2, picture, "")


def test_pictures_of_more_people_than_wanted_are_left_out():
    found = [Found(0, 3, (0, 0, 9, 9)), Found(8, 13, (9, 0, 20, 9)), Found(18, 21, (0, 9, 9, 20))]
    caption = "man and woman and dog"
    for most, out in ((0, None), (1, "with more than 1 people"), (2, None)):
        assert PictureFilter(Limits(max_people=most), people=("man", "woman")).crowd(found, caption) == out
    assert kept(built(pictures(2), max_people=1)[0]) == files(1, 2)


def test_clip_scores_pictures_by_their_captions():
    vision = SimpleNamespace(
        encode_image=lambda picture: {
            "image_embeds": torch.stack([picture.mean(), 1 - picture.mean()])[None],
            "penultimate_hidden_states": torch.zeros(1, 2, 2),
        }
    )
    weight = torch.nn.Parameter(torch.tensor([[1.0, 0.2], [0.1, 0.9]]))
    text = SimpleNamespace(
        tokenize=lambda prompt: prompt,
        encode_from_tokens=lambda tokens, return_pooled: (None, torch.tensor([[1.0, 0.0]])),
        cond_stage_model=SimpleNamespace(named_parameters=lambda: [("x.text_projection.weight", weight)]),
    )
    score = filters.chosen_score(Limits(), [], vision, text)
    for light in (0.25, 0.5, 1.0):
        wanted = 100 * light / math.hypot(light, 1 - light)
        assert score(0, torch.full((8, 8, 3), light), CAPTION) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_picture": 100}, r"all 2 pictures are left out: 2 smaller than 100 px\. Widen the limits"),
        ({"min_score": 1.0}, "min_score is 1, and nothing scores the pictures"),
        ({"max_text": 0.5}, "max_text is 0.5, and nothing says where text is"),
        ({"scores": [1.0]}, "scores has 1 numbers for 2 pictures"),
        ({"scores": [1.0, 1.0], "clip_vision": ["x"]}, "scores and clip_vision are both connected"),
        ({"clip_vision": ["x"]}, "connect the text half"),
        ({"max_text": 0.5, "text_masks": [torch.zeros(3, 8, 8)]}, "text_masks has entries for 1 pictures"),
    ],
)
def test_what_cannot_be_filtered_is_said_and_nothing_is_left_behind(output, values, words):
    with pytest.raises(ValueError, match=words):
        built(pictures(2), **values)
    assert not list(output.rglob("*_00001"))


# ---- how often people come


def lessons(people, others, weight, stage=FIRST, **settings):
    crop = Crop("man", 0, 3, (0, 0, 8, 8), 1.0, "x.png", person=True)
    records = [Record("x.png", "man", (64, 64), (crop,) * (i < people)) for i in range(people + others)]
    dataset = Dataset(None, tuple(records), Recipe(people_weight=weight))
    sizes = {i: (8, 8) for i in range(people + others) if i < people or stage == FIRST}
    return Lessons(dataset, TrainSettings(stage=stage, **settings), 4, sizes)


def came(found, epochs=1):
    return Counter(record for epoch in range(epochs) for batch in found.shuffled(epoch) for record in batch)


def test_people_come_as_often_as_the_weight_says():
    found = lessons(4, 8, 2.5, batch_size=2)
    assert found.per_epoch == len(found.epoch(0)) == len(found.epoch(7)) == (10 + 8) // 2
    assert all(came(found)[i] in (2, 3) for i in range(4))
    assert [came(found)[i] for i in range(4, 12)] == [1] * 8
    many = came(found, 40)
    assert sum(many[i] for i in range(4)) == 400 and all(80 < many[i] < 120 for i in range(4))
    rare = came(lessons(4, 8, 0.5, batch_size=1), 40)
    assert sum(rare[i] for i in range(4)) == 80 and all(10 <= rare[i] <= 30 for i in range(4))


def test_a_weight_of_one_is_the_order_without_it_and_people_alone_have_none():
    plain = lessons(4, 8, 1.0, batch_size=4, seed=3)
    crops = [each.crops for each in plain.dataset.records]
    assert any(crops) and plain.shuffled(2) == lessons(0, 12, 5.0, batch_size=4, seed=3).shuffled(2)
    assert came(lessons(4, 8, 3.0, stage=SECOND, batch_size=4)) == dict.fromkeys(range(4), 1)
    assert lessons(3, 0, 0.1, batch_size=1).per_epoch == 1


def test_a_folder_that_knows_no_weight_is_read_as_it_was():
    folder = built(pictures(2), people_weight=4.0)[0].folder
    assert read_dataset(folder).recipe.people_weight == 4.0
    header = json.loads((folder / "dataset.json").read_text())
    del header["recipe"]["people_weight"]
    (folder / "dataset.json").write_text(json.dumps(header))
    assert read_dataset(folder).recipe == Recipe(min_side=10)
    header["recipe"]["people_weight"] = 21.0
    (folder / "dataset.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"'people_weight'.*0\.1 to 20"):
        read_dataset(folder)
