"""Build Multimodal Dataset in the host: what is found, kept and written, how prompts are drawn, what is refused."""

import json

import comfy.model_management
import folder_paths
import pytest
import tiny_detector
import tiny_models
import torch
from palimpsest.nodes.multimodal.dataset import dataset as interleaved_dataset
from palimpsest.nodes.multimodal.dataset import files as multimodal_dataset_files
from palimpsest.nodes.multimodal.dataset import open_detection
from palimpsest.nodes.multimodal.dataset.dataset import STAGES, Found, Recipe
from palimpsest.nodes.multimodal.dataset.nodes import BuildMultimodalDataset, one_by_one
from palimpsest.nodes.multimodal.dataset.open_detection import Detection

FIRST, SECOND = STAGES.values()
CAPTION = "A big man and his red dog in the snow"


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Empty output, input and model folders."""
    for name in ("output", "input"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    multimodal_dataset_files.DETECTORS.register()
    return tmp_path


def masks(height=64, width=64):
    """A mask of the man on the left, one of the dog on the right."""
    found = torch.zeros(2, height, width)
    found[0, 4:60, 2:30] = 1
    found[1, 30:60, 36:60] = 1
    return found


def build(**values):
    """The node's outputs; every value becomes a list, as the host gives it."""
    chosen = {
        "images": [tiny_models.picture(1)], "captions": [CAPTION], "detector": "none", "words": "man, dog",
        "least_side": 10, "name": "test",
    } | values  # fmt: skip
    for socket in BuildMultimodalDataset.define_schema().inputs:
        default = getattr(socket, "default", None)
        if default is not None and not socket.optional:
            chosen.setdefault(socket.id, default)
    return BuildMultimodalDataset.execute(**{k: v if isinstance(v, list) else [v] for k, v in chosen.items()}).args


def texts(prompt):
    return "".join(part if isinstance(part, str) else f"[{part.name}]" for part in prompt)


# ---- what is written


def test_a_folder_of_pictures_and_lines_that_can_be_read_again(folders):
    dataset, sheet, report = build(masks=[masks()])
    folder = folders / "output" / "palimpsest_datasets" / "test_00001"
    assert dataset.folder == folder
    line = json.loads((folder / "dataset.jsonl").read_text())
    assert line["prompt"] == "A big <image1> man and his red <image2> dog in the snow"
    assert [(c["word"], c["box"], c["person"]) for c in line["crops"]] == [
        ("man", [2, 4, 30, 60], True), ("dog", [36, 30, 60, 60], False),
    ]  # fmt: skip
    for name in (line["picture"], *line["wholes"].values(), *(c["file"] for c in line["crops"]), "contact_sheet.jpg"):
        assert (folder / name).is_file()
    assert sorted(line["wholes"]) == ["canny", "sketch"]
    again = interleaved_dataset.read(folder)
    assert again.records == dataset.records
    assert again.recipe == dataset.recipe == Recipe(least_side=10)
    crop = interleaved_dataset.read_picture(folder / line["crops"][1]["file"])
    assert torch.equal(crop, dataset.picture(0)[30:60, 36:60])
    assert (tiny_models.picture(1)[0] - dataset.picture(0)).abs().max() <= 0.5 / 255 + 1e-6
    assert sheet.shape[0] == 1
    assert sheet.std() > 0.05
    assert report.startswith("test_00001: 1 pictures, 2 crops")
    assert multimodal_dataset_files.dataset_names() == [multimodal_dataset_files.CONNECTED, "test_00001"]
    assert multimodal_dataset_files.dataset_path("test_00001") == folder
    assert build(masks=[masks()])[0].folder.name == "test_00002"


def test_a_mask_can_take_the_background_away():
    mask = masks()
    mask[0, 20:40, 10:20] = 0
    dataset = build(masks=[mask], remove_background=True)[0]
    crop = interleaved_dataset.read_picture(dataset.folder / dataset.records[0].crops[0].file)
    assert not crop[16:36, 8:18].any()
    assert crop[:10].min() > 0


def test_boxes_by_word_and_by_label_are_the_same_as_masks():
    by_mask = build(masks=[masks()])[0].records[0]
    boxes = [{"x": 2, "y": 4, "width": 28, "height": 56}, {"x": 36, "y": 30, "width": 24, "height": 30}]
    by_word = build(boxes=[boxes])[0].records[0]
    labelled = [box | {"label": label, "score": 0.5} for box, label in zip(boxes, ("man", "dog"), strict=True)]
    by_label = build(boxes=[[labelled]], words="")[0].records[0]
    assert [c.box for c in by_word.crops] == [c.box for c in by_mask.crops] == [c.box for c in by_label.crops]
    assert [c.score for c in by_label.crops] == [0.5, 0.5]


def test_several_pictures_come_as_a_batch_or_a_list_with_lines_or_entries():
    pictures = tiny_models.picture(3)
    captions = [CAPTION, "a dog and a man", "a man with a dog"]
    batch = build(images=[pictures], captions="\n".join(captions), masks=[masks()] * 3)[0]
    listed = build(images=list(pictures[:, None]), captions=captions, masks=[masks()] * 3, words=["man, dog"] * 3)[0]
    assert [r.caption for r in batch.records] == captions
    assert batch.records == listed.records
    assert [c.word for c in batch.records[1].crops] == ["dog", "man"]
    one_each = build(images=[pictures], captions=captions, masks=[masks()[:1].repeat(3, 1, 1)], words="man")[0]
    assert [len(r.crops) for r in one_each.records] == [1, 1, 1]


def test_pictures_are_held_once_and_written_one_after_another():
    """No second copy of a large set; what lies outside of 0..1 is cut off when its turn comes."""
    batch = tiny_models.picture(3) * 2 - 0.5
    assert [picture.data_ptr() for picture in one_by_one([batch])] == [picture.data_ptr() for picture in batch]
    kept = batch.clone()
    dataset = build(images=[batch], captions=[CAPTION] * 3, masks=[masks()] * 3)[0]
    assert torch.equal(batch, kept)
    torch.testing.assert_close(dataset.picture(1), batch[1].clamp(0, 1), atol=0.51 / 255, rtol=0)


def test_small_and_large_crops_are_dropped_and_counted():
    large = torch.ones(2, 64, 64)
    large[1, :, 9:] = 0
    dataset, _, report = build(masks=[large], least_side=40)
    assert dataset.records[0].crops == ()
    assert "1 smaller than 40 x 40 px, 1 larger than 75 % of their picture" in report
    assert "1 pictures have no crop" in report
    assert texts(dataset.draw(0, FIRST, 4, torch.Generator())).endswith(CAPTION)


def test_a_depth_map_joins_the_wholes():
    dataset = build(masks=[masks()], depth=[tiny_models.picture(1, seed=3)], canny=False, sketch=False)[0]
    assert list(dataset.records[0].wholes) == ["depth"]


# ---- how prompts are drawn


def test_prompts_are_drawn_at_the_papers_rates():
    dataset = build(masks=[masks()])[0]
    drawn = [dataset.draw(0, FIRST, 4, torch.Generator().manual_seed(seed)) for seed in range(400)]
    words = [texts(prompt) for prompt in drawn]
    assert {w.removeprefix("[canny] ").removeprefix("[sketch] ") for w in words} == {
        "A big [man] man and his red dog in the snow", "A big man and his red [dog] dog in the snow",
        "A big [man] man and his red [dog] dog in the snow",
    }  # fmt: skip
    assert 0.24 < sum(w.startswith("[") for w in words) / 400 < 0.36
    shown = dataset.folder / dataset.records[0].crops[0].file
    plain = interleaved_dataset.read_picture(shown)
    men = [p.pixels for prompt in drawn for p in prompt if not isinstance(p, str) and p.name == "man"]
    varied = sum(not (m.shape == plain.shape and torch.equal(m, plain)) for m in men) / len(men)
    assert 0.13 < varied < 0.27
    assert all(p.tokens == 4 for prompt in drawn for p in prompt if not isinstance(p, str))
    again = dataset.draw(0, FIRST, 4, torch.Generator().manual_seed(7))
    assert texts(again) == words[7]


def test_heads_stand_for_people_at_their_rate(folders):
    places = [Found(6, 9, (2, 4, 30, 60)), Found(22, 25, (36, 30, 60, 60))]
    made, _ = interleaved_dataset.build(
        folders / "heads", [tiny_models.picture(1)[0]], [CAPTION], lambda *_: places, Recipe(4, vary_share=0), (),
        people=("man",), heads=lambda _: [((40, 40, 50, 50), 0.9), ((8, 6, 20, 18), 0.8), ((9, 6, 20, 18), 0.7)],
    )  # fmt: skip
    man, dog = made.records[0].crops
    assert man.head
    assert dog.head is None
    head = interleaved_dataset.read_picture(made.folder / man.head)
    assert head.shape[:2] == (12, 12)
    for stage in (FIRST, SECOND):
        drawn = [made.draw(0, stage, 4, torch.Generator().manual_seed(seed)) for seed in range(300)]
        men = [p.pixels.shape[:2] for prompt in drawn for p in prompt if not isinstance(p, str) and p.name == "man"]
        assert 0.62 < sum(size == (12, 12) for size in men) / len(men) < 0.78
        assert stage is FIRST or len(men) == 300


def test_at_most_three_crops_stand_in_a_prompt(folders):
    caption = "man, man, man, man, man"
    places = [Found(i * 5, i * 5 + 3, (i, 0, i + 20, 20)) for i in range(5)]
    made, _ = interleaved_dataset.build(
        folders / "five", [tiny_models.picture(1)[0]], [caption], lambda *_: places, Recipe(4), ()
    )
    counts = {
        sum(not isinstance(p, str) for p in made.draw(0, FIRST, 4, torch.Generator().manual_seed(seed)))
        for seed in range(60)
    }
    assert counts == {1, 2, 3}


# ---- the detector


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
            open_detection.places_of(words, CAPTION)
    else:
        assert [CAPTION[a:b] for a, b in open_detection.places_of(words, CAPTION)] == found


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    return tiny_detector.write(tmp_path_factory.mktemp("detectors") / "tiny-dino")


def test_a_folder_of_grounding_dino_detects_as_transformers_does(detector_folder):
    """Boxes and scores against transformers' own processing of the same picture and text."""
    from transformers import GroundingDinoForObjectDetection

    detector = open_detection.load(detector_folder)
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


def test_the_node_uses_the_chosen_detector(detector_folder, folders):
    (folders / "models" / "palimpsest_detectors").mkdir(parents=True)
    (folders / "models" / "palimpsest_detectors" / "tiny-dino").symlink_to(detector_folder)
    assert multimodal_dataset_files.detector_names() == ["none", "tiny-dino"]
    dataset = build(
        detector="tiny-dino", words="", box_threshold=0.01, text_threshold=0.3, least_side=1, largest_share=1.0
    )[0]
    assert all(CAPTION[c.start : c.end] == c.word for c in dataset.records[0].crops)
    with pytest.raises(ValueError, match="has no detector 'other'"):
        build(detector="other")


def test_only_the_wanted_words_are_cut_out():
    class Eye:
        def detect(self, picture, caption, *thresholds):
            return [Detection(2, 9, (0.1, 0.1, 0.5, 0.9), 0.9), Detection(18, 25, (0.5, 0.5, 1.0, 1.0), 0.8)]

    picture = tiny_models.picture(1)[0]
    every = interleaved_dataset.ByDetector(Eye())(0, picture, CAPTION)
    dogs = interleaved_dataset.ByDetector(Eye(), words=("dog", "cat"))(0, picture, CAPTION)
    assert [CAPTION[f.start : f.end] for f in every] == ["big man", "red dog"]
    assert [f.box for f in dogs] == [(32, 32, 64, 64)]


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
        open_detection.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors in it"):
        open_detection.load(folder)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "nothing says where the words are"),
        ({"masks": [masks()], "boxes": [[]]}, "both connected"),
        ({"masks": [masks()], "words": "man"}, "has 2 masks and 1 words"),
        ({"masks": [masks()], "words": "man, cat"}, "'cat' is not in the caption"),
        ({"masks": [masks()], "captions": "  "}, "0 texts for 1 pictures"),
        ({"masks": [masks()], "images": [tiny_models.picture(2)]}, "1 texts for 2 pictures"),
        ({"masks": [masks()], "depth": [tiny_models.picture(2)]}, "depth has 2 pictures for 1"),
        ({"masks": [masks()], "images": [torch.full((1, 8, 8, 3), float("nan"))]}, "NaN"),
        ({"masks": [masks()], "name": "../"}, "no letters or digits"),
    ],
)
def test_what_cannot_be_built_is_said_and_nothing_is_left_behind(folders, changes, words):
    with pytest.raises(ValueError, match=words):
        build(**changes)
    assert not list((folders / "output").rglob("*.json*"))
    assert not list((folders / "output").rglob("*_00001"))


def test_cancelling_leaves_nothing_behind(folders, monkeypatch):
    def stop():
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        build(masks=[masks()])
    assert not list((folders / "output" / "palimpsest_datasets").iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 of"),
        ('{"picture": "../../secret.png", "caption": "a", "size": [8, 8]}', "does not lie in the dataset"),
        ('{"picture": "/etc/x.png", "caption": "a", "size": [8, 8]}', "does not lie in the dataset"),
        ('{"caption": "a"}', "'picture'"),
    ],
)
def test_lines_that_cannot_be_read_or_lead_elsewhere_are_refused(line, words):
    folder = build(masks=[masks()])[0].folder
    (folder / "dataset.jsonl").write_text(line)
    with pytest.raises(ValueError, match=words):
        interleaved_dataset.read(folder)
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="not of this version's form"):
        interleaved_dataset.read(folder)


def test_lines_may_be_taken_out_and_corrected_by_hand():
    dataset = build(images=[tiny_models.picture(2)], captions=[CAPTION] * 2, masks=[masks()] * 2)[0]
    path = dataset.folder / "dataset.jsonl"
    line = json.loads(path.read_text().splitlines()[1])
    del line["crops"][0]
    path.write_text(json.dumps(line) + "\n\n")
    (record,) = interleaved_dataset.read(dataset.folder).records
    assert [c.word for c in record.crops] == ["dog"]
