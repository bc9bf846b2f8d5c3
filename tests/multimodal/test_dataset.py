"""Build Multimodal Dataset in the host: what is found, kept and written, how prompts are drawn, what is refused."""

import json

import comfy.model_management
import folder_paths
import pytest
import tiny_detector
import tiny_models
import torch
from palimpsest.nodes.multimodal import dataset as interleaved_dataset
from palimpsest.nodes.multimodal.dataset import STAGES, Found, Recipe, lists
from palimpsest.nodes.multimodal.dataset import files as multimodal_dataset_files
from palimpsest.nodes.multimodal.dataset import nodes as dataset_nodes
from palimpsest.nodes.multimodal.dataset.nodes import BuildMultimodalDataset

FIRST, SECOND = STAGES.values()
CAPTION = "A big man and his red dog in the snow"

pytestmark = pytest.mark.usefixtures("inference")


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
        "min_side": 10, "name": "test",
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
    again = interleaved_dataset.read_dataset(folder)
    assert again.records == dataset.records
    assert again.recipe == dataset.recipe == Recipe(min_side=10)
    crop = interleaved_dataset.read_picture(folder / line["crops"][1]["file"])
    assert torch.equal(crop, dataset.picture(0)[30:60, 36:60])
    assert (tiny_models.picture(1)[0] - dataset.picture(0)).abs().max() <= 0.5 / 255 + 1e-6
    assert sheet.shape[0] == 1
    assert sheet.std() > 0.05
    assert report.startswith("test_00001: 1 pictures, 2 crops")
    assert multimodal_dataset_files.dataset_names() == [multimodal_dataset_files.CONNECTED, "test_00001"]
    assert multimodal_dataset_files.dataset_path("test_00001") == folder
    assert build(masks=[masks()])[0].folder.name == "test_00002"


def test_a_folder_in_the_name_is_made_and_the_dataset_listed_in_it(folders):
    dataset, _, report = build(masks=[masks()], name="mine/%year%/pets")
    name = dataset.folder.relative_to(folders / "output" / "palimpsest_datasets").as_posix()
    assert name.startswith("mine/") and name.endswith("/pets_00001") and report.startswith(f"{name}: 1 pictures")
    assert multimodal_dataset_files.dataset_names() == [multimodal_dataset_files.CONNECTED, name]
    assert multimodal_dataset_files.dataset_path(name) == dataset.folder
    (folders / "output" / "palimpsest_datasets" / "file").touch()
    with pytest.raises(OSError, match=r"pets_00001 cannot be written \(Not a directory\)"):
        build(masks=[masks()], name="file/pets")


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


def test_a_picture_in_which_a_detector_of_boxes_found_nothing_has_no_crop():
    boxes = [[{"x": 2, "y": 4, "width": 28, "height": 56, "label": "man"}], []]
    for words in ("", ["man", "man, dog"]):
        both = {"images": [tiny_models.picture(2)], "captions": [CAPTION] * 2, "boxes": boxes, "words": words}
        dataset, _, report = build(**both)
        assert [len(record.crops) for record in dataset.records] == [1, 0]
        assert "1 pictures have no crop" in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": [masks(), masks()[:1]]}, "picture 2: it has 1 masks and 2 words"),
        ({"masks": [masks(), masks()], "captions": [CAPTION, "a man"]}, "picture 2: the word 'dog' is not in"),
        ({"boxes": [[], [{"x": 2, "y": 4, "width": 8, "height": 8}]]}, "picture 2: it has 1 boxes and 2 words"),
        ({"boxes": [[], [{"x": 2}]]}, "of picture 2"),
    ],
)
def test_an_odd_picture_is_named_before_the_first_is_written(folders, monkeypatch, changes, message):
    written = []
    monkeypatch.setattr(dataset_nodes, "build_dataset", lambda *_, **__: written.append(1))
    with pytest.raises(ValueError, match=message):
        build(**{"images": [tiny_models.picture(2)], "captions": [CAPTION] * 2} | changes)
    assert not written and not list((folders / "output").iterdir())


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
    assert [picture.data_ptr() for picture in lists.one_by_one([batch])] == [picture.data_ptr() for picture in batch]
    kept = batch.clone()
    dataset = build(images=[batch], captions=[CAPTION] * 3, masks=[masks()] * 3)[0]
    assert torch.equal(batch, kept)
    torch.testing.assert_close(dataset.picture(1), batch[1].clamp(0, 1), atol=0.51 / 255, rtol=0)


def test_small_and_large_crops_are_dropped_and_counted():
    large = torch.ones(2, 64, 64)
    large[1, :, 9:] = 0
    dataset, _, report = build(masks=[large], min_side=40)
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
    made, _ = interleaved_dataset.build_dataset(
        folders / "heads",
        [tiny_models.picture(1)[0]],
        [CAPTION],
        lambda *_: places,
        Recipe(min_side=4, vary_share=0),
        wholes=(),
        people=("man",),
        heads=lambda _: [((40, 40, 50, 50), 0.9), ((8, 6, 20, 18), 0.8), ((9, 6, 20, 18), 0.7)],
    )
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
    made, _ = interleaved_dataset.build_dataset(
        folders / "five", [tiny_models.picture(1)[0]], [caption], lambda *_: places, Recipe(min_side=4), wholes=()
    )
    counts = {
        sum(not isinstance(p, str) for p in made.draw(0, FIRST, 4, torch.Generator().manual_seed(seed)))
        for seed in range(60)
    }
    assert counts == {1, 2, 3}


def test_the_node_uses_the_chosen_detector(folders):
    tiny_detector.write(folders / "models" / "palimpsest_detectors" / "tiny-dino")
    dataset = build(detector="tiny-dino", words="", box_threshold=0.01, text_threshold=0.3, min_side=1, max_share=1.0)[
        0
    ]
    assert all(CAPTION[c.start : c.end] == c.word for c in dataset.records[0].crops)
    with pytest.raises(ValueError, match="has no detector 'other'"):
        build(detector="other")


# ---- a picture that is not square

WIDE, BOXES = (40, 90), [(5, 3, 30, 37), (50, 20, 88, 38)]  # (height, width); (left, top, right, bottom)


def wide_masks(scale=1):
    """The two boxes as masks, at a share of the picture's size."""
    found = torch.zeros(2, WIDE[0] * scale, WIDE[1] * scale)
    for mask, (left, top, right, bottom) in zip(found, BOXES, strict=True):
        mask[top * scale : bottom * scale, left * scale : right * scale] = 1
    return found


def as_boxes():
    return [{"x": a, "y": b, "width": c - a, "height": d - b} for a, b, c, d in BOXES]


@pytest.mark.parametrize(
    "found",
    [{"masks": [wide_masks()]}, {"masks": [wide_masks(3)]}, {"boxes": [as_boxes()]}],
    ids=["masks", "masks of another size", "boxes"],
)
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "high"])
def test_boxes_are_left_top_right_bottom_on_a_picture_that_is_not_square(found, turned):
    picture, wanted = tiny_models.picture(1, *WIDE), BOXES
    if turned:
        picture, wanted = picture.transpose(1, 2), [(b, a, d, c) for a, b, c, d in BOXES]
        found = {name: [turn(each) for each in values] for name, values in found.items()}
    dataset = build(images=[picture], canny=False, sketch=False, **found)[0]
    record = dataset.records[0]
    assert record.size == ((40, 90) if turned else (90, 40))  # width, height
    assert [crop.box for crop in record.crops] == wanted
    for crop in record.crops:
        left, top, right, bottom = crop.box
        file = interleaved_dataset.read_picture(dataset.folder / crop.file)
        torch.testing.assert_close(file, picture[0, top:bottom, left:right], atol=0.51 / 255, rtol=0)


def turn(found):
    """Masks or boxes with rows and columns exchanged."""
    if isinstance(found, torch.Tensor):
        return found.mT
    return [{"x": b["y"], "y": b["x"], "width": b["height"], "height": b["width"]} for b in found]


def test_boxes_are_cut_off_at_the_pictures_own_borders():
    box = {"x": -7, "y": -9, "width": 500, "height": 600}
    dataset = build(images=[tiny_models.picture(1, *WIDE)], boxes=[[box]], words="man", max_share=1.0)[0]
    assert dataset.records[0].crops[0].box == (0, 0, 90, 40)


def test_the_largest_share_is_of_the_pictures_own_area():
    boxes = [{"x": 0, "y": 0, "width": 90, "height": 20}, {"x": 0, "y": 0, "width": 90, "height": 21}]  # 0.5 and more
    dataset, _, report = build(images=[tiny_models.picture(1, *WIDE)], boxes=[boxes], max_share=0.5)
    assert [crop.word for crop in dataset.records[0].crops] == ["man"]
    assert "1 larger than 50 %" in report


# ---- settings by name


def test_every_widget_arrives_under_its_name(monkeypatch, folders):
    chosen = {
        "detector": "dino", "min_side": 11, "max_share": 0.31, "max_crops": 5, "head_share": 0.41, "vary_share": 0.51,
        "whole_share": 0.61, "canny": False, "sketch": True, "remove_background": True, "box_threshold": 0.71,
        "text_threshold": 0.81, "people": "Cat, dog", "name": "other", "min_picture": 12, "max_aspect": 7.5,
        "alike_bits": 3, "min_score": 0.75, "max_text": 0.25, "max_people": 4, "people_weight": 2.5,
    }  # fmt: skip
    caught = {}

    def keep(*given, **named):
        caught.update(named, given=given)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(multimodal_dataset_files.DETECTORS), "path", lambda self, name: f"folder of {name}")
    monkeypatch.setattr(dataset_nodes, "load_detector", lambda folder: folder)
    monkeypatch.setattr(dataset_nodes, "build_dataset", keep)
    with pytest.raises(KeyboardInterrupt):
        build(masks=[masks()], scores=[0.8], **chosen)
    folder, _, captions, finder, recipe, wholes = caught["given"]
    assert (folder.name, captions, wholes) == ("other_00001", [CAPTION], ("sketch",))
    assert (finder.words, finder.remove) == ([("man", "dog")], True)
    assert recipe.named() == {name: chosen[name] for name in recipe.named()}
    assert caught["people"] == caught["keep"].people == ("cat", "dog")
    limits = caught["keep"].limits.named()
    assert limits == {name: chosen[name] for name in limits} and limits.keys() | recipe.named().keys() <= chosen.keys()
    assert caught["keep"].score(0, None, "") == 0.8
    detector = caught["heads"].__self__
    assert (detector.detector, detector.box_threshold, detector.text_threshold) == ("folder of dino", 0.71, 0.81)
    sockets = {"images", "captions", "words", "masks", "boxes", "depth", "text_masks", "scores", "clip_vision", "clip"}
    assert {socket.id for socket in BuildMultimodalDataset.define_schema().inputs} == chosen.keys() | sockets
    assert type(recipe) is Recipe


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


@pytest.mark.parametrize("question", [1, 5, 20, 60])
def test_cancelling_leaves_nothing_behind(folders, monkeypatch, question):
    """Before the folder is made, and while pictures, crops and wholes are written into it."""
    asked, places = [], []

    def stop():
        asked.append(1)
        places.extend((folders / "output").glob("palimpsest_datasets/*"))
        if len(asked) >= question:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        build(masks=[masks()])
    assert bool(places) is (question > 5)
    assert not list((folders / "output").glob("palimpsest_datasets/*"))


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
        interleaved_dataset.read_dataset(folder)
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="not of this version's form"):
        interleaved_dataset.read_dataset(folder)


def test_lines_may_be_taken_out_and_corrected_by_hand():
    dataset = build(images=[tiny_models.picture(2)], captions=[CAPTION] * 2, masks=[masks()] * 2)[0]
    path = dataset.folder / "dataset.jsonl"
    line = json.loads(path.read_text().splitlines()[1])
    del line["crops"][0]
    path.write_text(json.dumps(line) + "\n\n")
    (record,) = interleaved_dataset.read_dataset(dataset.folder).records
    assert [c.word for c in record.crops] == ["dog"]
