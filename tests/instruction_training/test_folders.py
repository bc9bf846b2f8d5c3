"""Folders of triples: what is read of their lines and files, and what is refused before anything is opened."""

import json
import os

import numpy as np
import pytest
import torch
from instruction_training import teaching
from instruction_training.teaching import teach
from lora_training.teaching import text_encoder
from palimpsest.nodes.instruction_training import triples
from PIL import Image
from safetensors.torch import load_file
from tiny_models import unet


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    teaching.use_folders(monkeypatch, tmp_path)
    return tmp_path


def picture(path, seed=0, size=(64, 64)):
    values = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def place(folders):
    """A folder of three triples, the second with a mask."""
    made = folders / "input" / triples.FOLDERS / "edits"
    made.mkdir(parents=True)
    lines = []
    for number in range(3):
        picture(made / f"{number}.png", number)
        picture(made / f"{number}_after.png", number + 10)
        line = {"picture": f"{number}.png", "instruction": f"change {number}", "result": f"{number}_after.png"}
        lines.append(line)
    picture(made / "mask.png", 5)
    lines[1] |= {"mask": "mask.png", "expressed": "a cat in the snow"}
    write(made, lines)
    return made


def write(place, lines):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (place / triples.LINES).write_text(text, encoding="utf-8")


def test_a_folder_is_listed_and_read(place):
    assert triples.folder_names() == [triples.CONNECTED, "edits"]
    source = triples.in_folder("edits")
    assert (source.count, source.masked) == (3, True)
    found = list(source.read())
    assert [each.instruction for each in found] == ["change 0", "change 1", "change 2"]
    assert found[0].picture.shape == found[0].result.shape == (1, 64, 64, 3)
    assert found[0].mask is None
    assert found[1].mask.shape == (1, 64, 64)
    assert [each.expressed for each in found] == ["", "a cat in the snow", ""]


def test_a_folder_trains_as_its_pictures_do_when_they_are_connected(place, folders):
    model, clip = unet("sd15_edit"), text_encoder()
    found = list(triples.in_folder("edits").read())
    wired = {
        "pictures": [each.picture for each in found],
        "results": [each.result for each in found],
        "instructions": [each.instruction for each in found],
    }
    first = teach(model, clip, **wired)[-1]
    nothing = dict.fromkeys(("pictures", "results"))
    second = teach(model, clip, folder="edits", instructions=[""], **nothing)[-1]
    a, b = (load_file(folders / "loras" / name) for name in (first, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense\n", "line 1 of edits/triples.jsonl cannot be read"),
        ({"picture": "0.png", "result": "0_after.png"}, "it has no 'instruction'"),
        ({"picture": "../0.png", "instruction": "a", "result": "0.png"}, "does not lie in the dataset's folder"),
        ({"picture": "/etc/passwd", "instruction": "a", "result": "0.png"}, "does not lie in the dataset's folder"),
        ({"picture": 3, "instruction": "a", "result": "0.png"}, "'picture' of it is 3, a text is read"),
        ({"picture": "0.png", "instruction": " ", "result": "0.png"}, "'instruction' of it"),
        ([1, 2], "it is"),
    ],
)
def test_a_line_at_fault_is_named(place, line, message):
    write(place, [line if isinstance(line, str) else json.dumps(line) + "\n"])
    with pytest.raises(ValueError, match=message):
        triples.in_folder("edits")


def test_an_empty_list_says_what_to_write(place):
    write(place, ["\n"])
    with pytest.raises(ValueError, match="has no lines: write one"):
        triples.in_folder("edits")


def spoil(place, kind):
    file = place / "2.png"
    file.unlink()
    if kind == "link":
        outside = place.parent / "secret.png"
        picture(outside)
        file.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "text":
        file.write_text("no picture")
    elif kind == "small":
        picture(file, size=(4, 4))
    elif kind == "wide":
        picture(file, size=(128, 64))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot be opened"),
        ("link", "is a link out of its folder"),
        ("pipe", "is a pipe or a device"),
        ("text", "is damaged or none of PNG"),
        ("small", "4 x 4 pixels"),
        ("wide", "the result of line 3 has 64 x 64 pixels, its picture 128 x 64"),
    ],
)
def test_a_file_at_fault_is_named_before_it_is_opened(place, kind, message):
    spoil(place, kind)
    with pytest.raises(ValueError, match=message):
        list(triples.in_folder("edits").read())


def test_pictures_beyond_the_budget_are_not_decoded(place, monkeypatch):
    monkeypatch.setattr("palimpsest.nodes.picture_files.MOST_PIXELS", 64 * 63)
    with pytest.raises(ValueError, match="megapixels are taken"):
        list(triples.in_folder("edits").read())


def test_instructions_for_pictures():
    assert triples.texts_for(2, ["one\ntwo"], "instructions") == ["one", "two"]
    assert triples.texts_for(3, ["all  of it"], "instructions") == ["all of it"] * 3
    with pytest.raises(ValueError, match="2 instructions for 3 pictures"):
        triples.texts_for(3, ["a\nb"], "instructions")


def test_nan_is_a_sentence():
    bad = torch.full((1, 8, 8, 3), float("nan"))
    with pytest.raises(ValueError, match="triple 1 has NaN"):
        triples.fitting(triples.Triple(bad, "a", bad), "triple 1")
