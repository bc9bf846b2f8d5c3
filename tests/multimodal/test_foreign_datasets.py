"""Datasets that somebody else wrote or edited: typed lines, regular files within budgets, in any editor's encoding."""

import json
import os
import struct
import time
import zlib

import comfy.model_management
import numpy as np
import pytest
import tiny_models
import torch
from palimpsest.nodes import foreign
from palimpsest.nodes.host.cancelling import CancellableFile
from palimpsest.nodes.multimodal import dataset as datasets
from palimpsest.nodes.multimodal.dataset import STAGES, Recipe, lists, text
from palimpsest.nodes.multimodal.dataset.dataset import RANGES
from palimpsest.nodes.multimodal.dataset.finders import ByBox, ByMask
from palimpsest.nodes.multimodal.dataset.lines import record_of
from palimpsest.nodes.multimodal.dataset.nodes import BuildMultimodalDataset
from palimpsest.nodes.multimodal.dataset.pictures import MOST_PIXELS, read_picture, write_picture
from PIL import Image, ImageOps

INTERRUPT = comfy.model_management.InterruptProcessingException
CROP = {"word": "cat", "start": 2, "end": 5, "box": [0, 0, 16, 16], "score": 1.0, "file": "a.png"}
LINE = {"picture": "a.png", "caption": "a cat", "size": [32, 32], "crops": [CROP], "wholes": {"canny": "a.png"}}
HEADER = {"format": "palimpsest.multimodal_dataset", "version": 1, "recipe": {}}

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def folder(tmp_path):
    """A dataset's folder with one picture, and a picture outside of it."""
    (tmp_path / "set").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "set" / "a.png")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "secret.png")
    return put(tmp_path / "set")


def put(folder, line=None, header=None, raw=None):
    """A folder with another line, or bytes in its place, and another header."""
    (folder / "dataset.json").write_text(json.dumps(HEADER | (header or {})))
    (folder / "dataset.jsonl").write_bytes(json.dumps(LINE | (line or {})).encode() + b"\n" if raw is None else raw)
    return folder


def crop(**values):
    return {"crops": [CROP | values]}


def without(name, said):
    return {key: value for key, value in said.items() if key != name}


# ---- lines


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"picture": 5}, "'picture' of it is 5, a text is read"),
        ({"picture": ""}, "'picture' of it is '', a text"),
        ({"picture": None}, "'picture' of it is None"),
        ({"picture": "C:/x.png"}, "'C:/x.png' does not lie in the dataset's folder"),
        ({"picture": "..\\x.png"}, "does not lie in"),
        ({"picture": "a\0.png"}, r"'a\\x00.png' does not lie in"),
        ({"picture": "\ud800.png"}, "'picture' of it is .*, a text is read"),
        ({"picture": "x" * 5000}, "'picture' of it has 5000 letters, at most 1024"),
        ({"caption": 5}, "'caption' of it is 5, a text"),
        ({"caption": None}, "'caption' of it is None"),
        ({"caption": " "}, "'caption' of it is ' ', a text"),
        ({"caption": "x" * 200_000, "crops": []}, "'caption' of it has 200000 letters"),
        ({"size": "ab"}, "'size' of it is 'ab', a list of 2 whole numbers"),
        ({"size": None}, "'size' of it is None"),
        ({"size": [True, 8]}, r"'size' of it is \[True, 8\]"),
        ({"size": [10**12, 10**12]}, "'size' of it is .*, a size from 8 x 8 to 33.6 megapixels"),
        ({"size": [4, 40]}, "a size from 8 x 8"),
        ({"crops": None}, "'crops' of it is None, a list in brackets"),
        ({"crops": {"a": 1}}, "a list in brackets"),
        ({"crops": ["x"]}, "crop 1 is 'x', an object in braces"),
        ({"crops": [CROP] * 1001}, "'crops' of it has 1001 parts"),
        ({"crops": [without("box", CROP)]}, "crop 1 has no 'box'"),
        (crop(start="2"), "'start' of crop 1 is '2', a whole number"),
        (crop(start=2.5), "'start' of crop 1 is 2.5"),
        (crop(start=-1), "'start' of crop 1 is -1"),
        (crop(end=None), "'end' of crop 1 is None"),
        (crop(box="abcd"), "'box' of crop 1 is 'abcd', a list of 4 whole numbers"),
        (crop(box=[1, 2, 3]), r"'box' of crop 1 is \[1, 2, 3\]"),
        (crop(box=[20, 20, 1, 1]), r"'box' of crop 1 is \[20, 20, 1, 1\], a part .* of 32 x 32 pixels"),
        (crop(box=[0, 0, 99, 16]), "a part .* of 32 x 32 pixels"),
        (crop(box=[-(10**18), 0, 10**18, 5]), "a part .* of 32 x 32 pixels"),
        (crop(box=[0.5, 0, 3, 3]), "a list of 4 whole numbers"),
        (crop(box=None), "'box' of crop 1 is None"),
        (crop(score="<b>"), "'score' of crop 1 is '<b>', a number"),
        (crop(score=None), "'score' of crop 1 is None"),
        (crop(word=5), "'word' of crop 1 is 5, a text"),
        (crop(word=None), "'word' of crop 1 is None"),
        (crop(file="../x"), "'../x' does not lie in"),
        (crop(file=None), "'file' of crop 1 is None"),
        (crop(head="../../x.png"), "does not lie in"),
        (crop(head=5), "'head' of crop 1 is 5"),
        (crop(person="no"), "'person' of crop 1 is 'no', true or false"),
        ({"wholes": ["a"]}, r"'wholes' of it is \['a'\], an object in braces"),
        ({"wholes": {"canny": 5}}, "'canny' of 'wholes' is 5, a text"),
        ({"wholes": {"canny": "../x"}}, "does not lie in"),
    ],
)  # fmt: skip
def test_a_line_of_another_kind_is_named_with_what_is_read(folder, line, says):
    with pytest.raises(ValueError, match=rf"line 1 of set/dataset.jsonl cannot be read \(.*{says}") as told:
        datasets.read_dataset(put(folder, line))
    assert len(str(told.value)) < 400


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"[1,2]", r"it is \[1, 2\], an object in braces"),
        (b"5", "it is 5, an object"),
        (b"null", "it is None, an object"),
        (b'"x"', "it is 'x', an object"),
        (b"[" * 200_000, "nested deeper than 16 levels"),
        (b"[" * 17 + b"]" * 17, "nested deeper than 16 levels"),
        (b"NaN", "NaN is no number"),
        (b'{"size": [Infinity, 1]}', "Infinity is no number"),
        (b"1" * 6000, "a number in it has 6000 digits"),
        (b"x" * (1 << 21), "more than 1048576 letters"),
        (json.dumps(LINE).replace("a cat", "caf\u00e9").encode("cp1252"), "not in UTF-8 near"),
        (json.dumps(LINE, ensure_ascii=False).replace("a cat", "\u72d7").encode("gb18030"), "not in UTF-8 near"),
        (json.dumps(LINE).encode("utf-16-le"), "not in UTF-8 near"),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_bytes_that_are_no_line_are_told(folder, raw, says):
    with pytest.raises(ValueError, match=f"line 1 of set/dataset.jsonl cannot be read .*{says}"):
        datasets.read_dataset(put(folder, raw=raw))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_dataset_saved_by_an_editor_is_read(folder, encoding, ending):
    """With a byte order mark, Windows' line ends, and line separators that are letters of a caption."""
    line = LINE | {"caption": "a cat\u2028on\x85caf\u00e9 \u72d7"}
    text = ending.join(json.dumps(line, ensure_ascii=False) for _ in range(2)) + ending
    put(folder, raw=text.encode(encoding))
    header = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_bytes(header.encode(encoding))
    read = datasets.read_dataset(folder)
    assert [record.caption for record in read.records] == [line["caption"]] * 2


def test_a_folder_without_its_files_is_told(folder):
    (folder / "dataset.jsonl").unlink()
    with pytest.raises(ValueError, match=r"'set/dataset.jsonl' cannot be opened \(No such file"):
        datasets.read_dataset(folder)
    os.mkfifo(folder / "dataset.jsonl")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        datasets.read_dataset(folder)


def test_a_disk_that_fails_is_not_told_as_a_damaged_file(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    dataset = datasets.read_dataset(folder)
    monkeypatch.setattr(CancellableFile, "read", fail)
    with pytest.raises(ValueError, match=r"'set/a.png' cannot be read \(Input/output error\): let ComfyUI read it"):
        dataset.picture(0)
    monkeypatch.setattr("builtins.open", fail)
    for file in (lambda: foreign.object_of(folder / "dataset.json", ""), lambda: [*foreign.lines_of(folder / "a.png")]):
        with pytest.raises(ValueError, match=r"cannot be read \(Input/output error\)"):
            file()


# ---- the recipe


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ([], r"the recipe is \[\], an object"),
        (None, "the recipe is None"),
        ({"evil": 1}, "the recipe has 'evil', it knows min_side"),
        ({"vary_share": "x"}, "'vary_share' of the recipe is 'x', a number from 0 to 1"),
        ({"vary_share": 2}, "is 2, a number from 0 to 1"),
        ({"max_crops": -1}, "'max_crops' of the recipe is -1, a whole number from 1 to 8"),
        ({"max_crops": "3"}, "is '3', a whole number"),
        ({"max_crops": 1.5}, "is 1.5, a whole number"),
        ({"min_side": True}, "is True, a whole number"),
        ({"min_side": 10**30}, "a whole number from 1 to 4096"),
    ],
)
def test_a_recipe_of_another_kind_is_told(folder, recipe, says):
    with pytest.raises(ValueError, match=rf"set/dataset.json has a recipe that cannot be read \(.*{says}"):
        datasets.read_dataset(put(folder, header={"recipe": recipe}))


@pytest.mark.parametrize("header", ["[" * 200_000, "[]", "{", "", "5"])
def test_a_header_that_is_none_is_told(folder, header):
    (folder / "dataset.json").write_text(header)
    with pytest.raises(ValueError, match=r"set/dataset.json .*make a dataset with Build Multimodal Dataset"):
        datasets.read_dataset(folder)


def test_a_recipes_ranges_are_the_inputs():
    inputs = {each.id: each for each in BuildMultimodalDataset.define_schema().inputs}
    assert {name: (inputs[name].min, inputs[name].max) for name in RANGES} == RANGES
    assert RANGES.keys() == Recipe().named().keys()


# ---- pictures


def png(width, height, rows=b"", depth=1, colour=0):
    """A PNG of a size with some data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (png(30_000, 30_000, depth=8, colour=2), "is too large|30000 x 30000"),
        (png(13_000, 13_000, b"\0" * 1626 * 13_000), "13000 x 13000 pixels, .* to 33.6 megapixels"),
        (png(MOST_PIXELS + 1, 1), "33554433 x 1 pixels"),
        (png(0, 0), "damaged or none of PNG"),
        (png(64, 64), "damaged or none of"),
        (b"", "damaged or none of"),
        (b"hello", "damaged or none of"),
        (b"<svg/>", "damaged or none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) print\n", "damaged or none of"),
        (json.dumps(HEADER).encode(), "damaged or none of"),
    ],
    ids=lambda value: str(value[:8]),
)
def test_a_picture_beyond_the_budget_or_of_another_kind_is_not_decoded(folder, content, says):
    (folder / "b.png").write_bytes(content)
    dataset = datasets.read_dataset(put(folder, {"picture": "b.png"}))
    began = time.monotonic()
    with pytest.raises(ValueError, match=says):
        dataset.picture(0)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_picture_of_any_mode_keeps_its_greys(folder, mode):
    """White, middle grey and black, also in 16 bits, which Pillow by itself would make white."""
    greys = np.array([[0] * 8, [128] * 8, [255] * 8] * 3, dtype=np.uint8)
    image = Image.fromarray(greys.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(greys).convert(mode)
    image.save(folder / "b.png")
    found = read_picture(folder / "b.png")
    assert found.shape == (9, 8, 3)
    rows = (0, 2) if mode == "1" else (0, 1, 2)
    torch.testing.assert_close(found[rows, 0, 0], torch.tensor(greys[rows, 0] / 255).float(), atol=1 / 255, rtol=0)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_photograph_is_read_upright(folder, kind, orientation):
    """As the host's Load Image, by what the camera wrote beside it; what is none of the eight says nothing."""
    corner = Image.new("L", (32, 16), 0)
    corner.paste(255, (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner.save(folder / "b.png", kind, exif=exif)
    with Image.open(folder / "b.png") as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    torch.testing.assert_close(read_picture(folder / "b.png"), torch.tensor(wanted / 255).float())


def test_what_stands_beside_a_photograph_may_be_nonsense(folder):
    Image.new("L", (32, 16), 0).save(folder / "b.png", "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read_picture(folder / "b.png").shape == (16, 32, 3)


def test_a_file_that_is_too_large_is_not_opened(folder):
    (folder / "b.png").open("wb").truncate(1 << 29)
    with pytest.raises(ValueError, match="has more than 269 MB"):
        read_picture(folder / "b.png")


def linked(folder, target, name="b.png"):
    (folder / name).symlink_to(target)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: linked(f, f.parent / "secret.png"), "'set/b.png' is a link out of its folder, to 'secret.png'"),
        (lambda f: linked(f, "../secret.png"), "is a link out of its folder"),
        (lambda f: linked(f, "b.png"), "cannot be opened"),
        (lambda f: os.mkfifo(f / "b.png"), "is a pipe or a device"),
        (lambda f: linked(f, "/dev/zero"), "is a pipe or a device"),
        (lambda f: (f / "b.png").mkdir(), "is a folder"),
        (lambda f: None, "cannot be opened .No such file"),
    ],
)
def test_only_regular_files_of_the_folder_are_opened(folder, make, says):
    make(folder)
    for line, ask in (
        ({"picture": "b.png"}, lambda d: d.picture(0)),
        (crop(file="b.png"), datasets.overview),
        ({"wholes": {"canny": "b.png"}}, datasets.overview),
        (crop(head="b.png"), datasets.overview),
    ):
        dataset = datasets.read_dataset(put(folder, line))
        with pytest.raises(ValueError, match=says):
            ask(dataset)


def test_a_link_within_the_folder_and_a_linked_folder_are_read(folder):
    linked(folder, "a.png")
    linked(folder.parent, folder, "other")
    dataset = datasets.read_dataset(put(folder, {"picture": "b.png"}))
    assert dataset.picture(0).shape == (32, 32, 3)
    assert datasets.read_dataset(folder.parent / "other").picture(0).shape == (32, 32, 3)


def test_a_picture_of_another_size_than_its_line_says_is_told(folder):
    Image.new("RGB", (40, 32)).save(folder / "a.png")
    with pytest.raises(ValueError, match=r"a.png of the dataset 'set' has 40 x 32 pixels, its line says 32 x 32"):
        datasets.read_dataset(folder).picture(0)


# ---- cancelling


def stop_at(monkeypatch, count):
    """Let the host say after so many questions that the run is cancelled."""
    asked = []

    def stop():
        asked.append(1)
        if len(asked) >= count:
            raise INTERRUPT

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)


def test_reading_lines_and_pictures_stops_when_cancelled(folder, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))
    noise.save(folder / "a.png")  # 0.8 MB, in pieces of 64 KiB
    dataset = datasets.read_dataset(put(folder, {"size": [512, 512]}))
    put(folder, raw=b"\n" * 1000)
    stop_at(monkeypatch, 500)
    with pytest.raises(INTERRUPT):
        datasets.read_dataset(folder)
    stop_at(monkeypatch, 8)
    with pytest.raises(INTERRUPT):
        dataset.picture(0)
    stop_at(monkeypatch, 8)
    with pytest.raises(INTERRUPT):
        write_picture(torch.rand(512, 512, 3), folder, "c.png")
    stop_at(monkeypatch, 1)
    with pytest.raises(INTERRUPT):
        dataset.draw(0, next(iter(STAGES.values())), 4, torch.Generator())


@pytest.mark.parametrize("kind", ["canny", "sketch"])
def test_drawing_a_whole_stops_when_cancelled(monkeypatch, kind):
    from palimpsest.nodes.multimodal.dataset.pictures import WHOLES

    stop_at(monkeypatch, 5)
    with pytest.raises(INTERRUPT):
        WHOLES[kind](torch.rand(32, 32, 3))


# ---- a caption that was edited after its places were found


@pytest.mark.parametrize(
    ("caption", "place"),
    [
        ("a cat", (2, 5)),
        ("there is a cat", (11, 14)),
        ("A Cat!", (2, 5)),
        ("\u516c\u56ed\u91cc\u7684cat", (4, 7)),
    ],
)
def test_a_crop_follows_its_word(caption, place):
    (found,) = record_of(json.dumps(LINE | {"caption": caption})).crops
    assert (found.start, found.end) == place
    assert found.word == caption[slice(*place)]


@pytest.mark.parametrize(
    ("caption", "says"),
    [
        ("a dog", "'cat', the word of a crop, is not in it any more"),
        ("one cat and a cat", "stands there more than once"),
    ],
)
def test_a_crop_whose_word_is_gone_is_told(caption, says):
    with pytest.raises(ValueError, match=f"the caption was edited, and .*{says}"):
        record_of(json.dumps(LINE | {"caption": caption}))


def test_two_crops_of_one_word_keep_their_places():
    crops = [CROP, CROP | {"start": 10, "end": 13}]
    found = record_of(json.dumps(LINE | {"caption": "a cat and cat", "crops": crops})).crops
    assert [each.start for each in found] == [2, 10]
    moved = record_of(json.dumps(LINE | {"caption": "a cat, and cat", "crops": crops})).crops
    assert [each.start for each in moved] == [2, 11]


# ---- words


@pytest.mark.parametrize(
    ("caption", "word", "found"),
    [
        ("\u516c\u56ed\u91cc\u7684\u4e00\u53ea\u72d7", "\u72d7", [(6, 7)]),
        ("\u8336\u8272\u3044\u72ac\u304c\u7acb\u3064", "\u72ac", [(3, 4)]),
        ("\u0e2b\u0e21\u0e32\u0e2a\u0e35\u0e19\u0e49\u0e33", "\u0e2b\u0e21\u0e32", [(0, 3)]),
        ("\u0e2a\u0e35\u0e19\u0e49\u0e33", "\u0e2a", []),  # a consonant without its vowel is no word
        ("\u4e00\u53eadog\u5728\u8dd1", "dog", [(2, 5)]),
        ("\u4e00\u53eadogs\u5728\u8dd1", "dog", []),
        ("T\u30b7\u30e3\u30c4", "\u30b7\u30e3\u30c4", [(1, 4)]),
        ("\ubd89\uc740 \uac1c\uac00", "\uac1c", []),  # Korean has blanks
        ("a red  dog", "Red dog", [(2, 10)]),
        ("a cafe\u0301", "cafe", []),
        ("aaa aa", "aa", [(4, 6)]),
    ],
)
def test_a_word_is_found_in_any_script(caption, word, found):
    assert text.spots_of(word, caption) == found


def test_commas_of_any_script_separate_words():
    assert text.comma("\u72d7\uff0c\u732b\u3001 red dog, \u9ce5\u060c,\ufeff x") == (
        "\u72d7", "\u732b", "red dog", "\u9ce5", "x",
    )  # fmt: skip


def test_captions_are_cleaned_and_only_editors_lines_separate_them():
    assert lists.captions_for_each(["\ufeffa cafe\u0301\u2028on\r\na dog\n\n"], 2) == ["a caf\u00e9 on", "a dog"]
    assert lists.words_for_each(["caf\u00e9\r\ndog\uff0ccat"], 2) == [("caf\u00e9",), ("dog", "cat")]


@pytest.mark.parametrize(
    ("phrase", "people", "person"),
    [
        ("big man", ("man",), True),
        ("woman", ("man",), False),
        ("snow-man", ("man",), False),
        ("\u4e00\u4e2a\u7537\u4eba", ("\u7537\u4eba",), True),
        ("\u72d7", ("\u7537\u4eba",), False),
    ],
)
def test_people_are_known_in_any_script(phrase, people, person):
    assert text.is_person(phrase, people) is person


# ---- what other nodes give


def frame(**values):
    return {"x": 2, "y": 3, "width": 10, "height": 12} | values


@pytest.mark.parametrize(
    ("box", "says"),
    [
        (without("x", frame()), "x of box 1 of picture 1 is None, a number is needed"),
        (frame(width="9"), "width of box 1 of picture 1 is '9'"),
        (frame(y=float("nan")), "y of box 1 of picture 1 is nan"),
        (frame(x=1e30), "x of box 1 of picture 1 is 1e"),
        (frame(score="high"), "score of box 1 of picture 1 is 'high'"),
        (frame(score=float("nan")), "score of box 1 of picture 1 is nan"),
        (frame(height=True), "height of box 1 of picture 1 is True"),
        (frame(label=5), "label of box 1 of picture 1 is 5"),
    ],
)
def test_a_box_of_another_kind_is_told(box, says):
    with pytest.raises(ValueError, match=says):
        ByBox([[box]], [("cat",)])(0, torch.rand(32, 32, 3), "a cat")


def test_numbers_of_other_libraries_are_numbers():
    box = frame(x=np.float32(2), y=torch.tensor(3), score=np.float64(0.5))
    (found,) = ByBox([[box]], [("cat",)])(0, torch.rand(32, 32, 3), "a cat")
    assert (found.box, found.score) == ((2, 3, 12, 15), 0.5)


@pytest.mark.parametrize("boxes", ["abc", 5, None, [[[[[[frame()]]]]]], [["x"]]])
def test_boxes_of_another_form_are_told(boxes):
    with pytest.raises(ValueError, match=r"boxes has .*, a box is an object of x, y, width and height"):
        lists.boxes_for_each([boxes], 1)


def test_masks_without_numbers_are_told_and_empty_ones_counted(tmp_path):
    with pytest.raises(ValueError, match="empty or holds NaN"):
        lists.masks_for_each([torch.full((1, 8, 8), float("nan"))], 1)
    finder = ByMask([torch.zeros(1, 8, 8)], [("cat",)])
    _, counted = datasets.build_dataset(tmp_path, [torch.rand(8, 8, 3)], ["a cat"], finder, Recipe(), wholes=())
    assert counted.too_small == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_one_three_and_four_channels_are_built(channels):
    (picture,) = lists.one_by_one([tiny_models.picture(1)[..., :1].repeat(1, 1, 1, channels)])
    assert picture.shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.rand(1, 8, 8, 2), r"images has the form \(1, 8, 8, 2\): connect pictures"),
        (torch.rand(8, 8, 3), r"images has the form \(8, 8, 3\)"),
        (torch.rand(0, 8, 8, 3), "images is empty or holds NaN"),
        (torch.rand(1, 4, 9, 3), "picture 1 of images has 9 x 4 pixels, from 8 x 8"),
        (torch.rand(1, 1, 1, 3).expand(1, 8192, 4097, 3), "picture 1 of images has 4097 x 8192 pixels"),
    ],
)
def test_pictures_of_another_form_are_told(images, says):
    with pytest.raises(ValueError, match=says):
        lists.one_by_one([images])
