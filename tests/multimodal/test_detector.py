"""The detector of captions' words in the host: its folder, its boxes, and the phrases that they belong to."""

import json

import folder_paths
import pytest
import tiny_detector
import tiny_models
import torch
from palimpsest.nodes.multimodal import dataset as interleaved_dataset
from palimpsest.nodes.multimodal.dataset import files as multimodal_dataset_files
from palimpsest.nodes.multimodal.dataset import open_detection, text
from palimpsest.nodes.multimodal.dataset.open_detection import Detection

CAPTION = "A big man and his red dog in the snow"

pytestmark = pytest.mark.usefixtures("inference")


def test_boxes_become_phrases_of_the_caption():
    caption = "A big man and his red dog."
    offsets = [(0, 0), (0, 1), (2, 5), (6, 9), (10, 13), (14, 17), (18, 21), (22, 24), (24, 25), (25, 26), (0, 0)]
    scores = torch.full((5, 11), 0.05)
    scores[0, 1:4] = torch.tensor([0.3, 0.3, 0.8])  # A big man
    scores[1, 2:4] = torch.tensor([0.26, 0.6])  # big man, worse
    scores[2, 7] = 0.5  # half of a word
    scores[3, 6] = 0.3  # below the box threshold
    scores[4, 9] = 0.9  # the full stop
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.4, 0.4], [0.5] * 4, [0.5] * 4])
    found = open_detection.best_by_phrase(scores, boxes, offsets, caption, 0.35, 0.25)
    assert [caption[each.start : each.end] for each in found] == ["big man", "dog"]
    assert found[0].box == pytest.approx((0.3, 0.4, 0.7, 0.6))
    assert found[1].box == pytest.approx((0.7, 0.7, 1.0, 1.0))
    assert [each.score for each in found] == pytest.approx([0.8, 0.5])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["dog"], ["dog"]),
        (["red dog", "MAN"], ["red dog", "man"]),
        (["man", "man"], None),
        (["do"], None),
        ([""], None),
    ],
)
def test_words_are_found_whole_and_once_each(words, found):
    if found is None:
        with pytest.raises(ValueError, match="is not in the caption"):
            text.positions_of(words, CAPTION)
    else:
        assert [CAPTION[a:b] for a, b in text.positions_of(words, CAPTION)] == found


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    return tiny_detector.write(tmp_path_factory.mktemp("detectors") / "tiny-dino")


def test_a_folder_of_grounding_dino_detects_as_transformers_does(detector_folder):
    """Boxes and scores against transformers' own processing of the same picture and text."""
    from transformers import GroundingDinoForObjectDetection

    detector = open_detection.load_detector(detector_folder)
    assert detector.sizes == (96, 160)
    picture, caption = tiny_models.picture(1, 60, 90)[0], "a big man and his dog"
    found = detector.detect(picture, caption, 0.01, 0.01)
    model = GroundingDinoForObjectDetection.from_pretrained(detector_folder)
    read = detector.tokenizer(caption + ".", return_tensors="pt")
    seen = detector.shown(picture)
    assert seen.shape == (1, 3, 96, 144)
    with torch.no_grad():
        outputs = model(pixel_values=seen, input_ids=read["input_ids"], attention_mask=read["attention_mask"])
    best = outputs.logits[0].sigmoid()[:, 1:-2].max(1)
    row = int(best.values.argmax())
    x, y, w, h = outputs.pred_boxes[0, row].tolist()
    assert found[0].score == pytest.approx(float(best.values[row]), rel=1e-4)
    assert found[0].box == pytest.approx(
        [min(max(v, 0), 1) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)], abs=1e-4
    )


def test_only_the_wanted_words_are_cut_out():
    class Fixed:
        def detect(self, picture, caption, *thresholds):
            return [Detection(2, 9, (0.1, 0.1, 0.5, 0.9), 0.9), Detection(18, 25, (0.5, 0.5, 1.0, 1.0), 0.8)]

    picture = tiny_models.picture(1, 64, 100)[0]
    every = interleaved_dataset.ByDetector(Fixed())(0, picture, CAPTION)
    dogs = interleaved_dataset.ByDetector(Fixed(), words=[("dog", "cat")])(0, picture, CAPTION)
    assert [CAPTION[f.start : f.end] for f in every] == ["big man", "red dog"]
    assert [f.box for f in every] == [(10, 6, 50, 58), (50, 32, 100, 64)]
    assert [f.box for f in dogs] == [(50, 32, 100, 64)]
    several = interleaved_dataset.ByDetector(Fixed(), words=[("dog",), ()])
    assert [len(several(index, picture, CAPTION)) for index in range(2)] == [1, 2]  # each picture has its own words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "of type 'bert'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "program code of its own"),
    ],
)
def test_other_folders_are_refused(detector_folder, tmp_path, change, words):
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in detector_folder.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        open_detection.load_detector(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors in it"):
        open_detection.load_detector(folder)


@pytest.mark.parametrize(("size", "shown"), [((60, 90), (96, 144)), ((90, 60), (144, 96)), ((20, 80), (40, 160))])
def test_a_picture_is_shown_within_the_models_sizes(size, shown):
    detector = open_detection.Detector("any", None, None, sizes=(96, 160))
    assert detector.shown(torch.rand(*size, 3)).shape == (1, 3, *shown)


def test_the_chosen_detector_is_one_of_the_listed_folders(detector_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    multimodal_dataset_files.DETECTORS.register()
    (tmp_path / "models" / "palimpsest_detectors" / "tiny-dino").symlink_to(detector_folder)
    assert multimodal_dataset_files.detector_names() == ["none", "tiny-dino"]
    with pytest.raises(ValueError, match="has no detector 'other'"):
        multimodal_dataset_files.DETECTORS.path("other")
