"""The files that a training leaves: one free number for all of them, tried before, and all kept that can be."""

import resource
from pathlib import Path

import folder_paths
import pytest
import torch
from palimpsest.nodes import files
from palimpsest.nodes.training import FileSet
from safetensors.torch import load_file

STATES, THINGS = (
    files.Shelf(folder=folder, format=folder, version=1, what=("a file", "Train"), example="mine", room="train less")
    for folder in ("palimpsest_states", "palimpsest_things")
)
PLACES = {"state": (STATES, ""), "thing": (THINGS, ""), "lora": (THINGS, "_unet")}


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    for shelf in (STATES, THINGS):
        place = ([str(tmp_path / shelf.folder)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, shelf.folder, place)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def contents(value=1.0, numbers=4):
    return {part: ({"a": torch.full((numbers,), value)}, {}) for part in PLACES}


def names(models):
    return sorted(str(path.relative_to(models)) for path in models.rglob("*") if path.is_file())


def test_a_number_is_free_for_all_files_or_for_none(models):
    for taken in ("palimpsest_states/over_00001.safetensors", "palimpsest_things/over_00002_unet.safetensors"):
        (models / taken).parent.mkdir(exist_ok=True)
        (models / taken).write_bytes(b"EARLIER")
    written = FileSet.new("over", PLACES).write(contents())
    assert written == [
        "models/palimpsest_states/over_00003.safetensors",
        "models/palimpsest_things/over_00003.safetensors",
        "models/palimpsest_things/over_00003_unet.safetensors",
    ]
    assert (models / "palimpsest_states" / "over_00001.safetensors").read_bytes() == b"EARLIER"
    assert (models / "palimpsest_things" / "over_00002_unet.safetensors").read_bytes() == b"EARLIER"


def test_what_was_written_before_is_written_anew_and_nothing_else(models):
    made = FileSet.new("sub/mine", PLACES)
    made.write({part: each for part, each in contents(1.0).items() if part != "lora"})
    made.write(contents(2.0))
    found = names(models)
    assert len(found) == 3 and all("mine_00001" in name for name in found)
    assert all(load_file(models / name)["a"][0] == 2.0 for name in found)


@pytest.mark.parametrize("taken", ["state", "lora"])
def test_a_number_that_another_process_took_meanwhile_is_left_to_it(models, taken):
    made = FileSet.new("mine", PLACES)
    path = made.paths[taken]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"ANOTHER'S")
    written = made.write(contents())
    assert all("mine_00002" in name for name in written)
    assert path.read_bytes() == b"ANOTHER'S"
    assert sum("mine_00001" in name for name in names(models)) == 1


def test_a_later_part_whose_name_was_taken_costs_no_earlier_one(models):
    made, parts = FileSet.new("mine", PLACES), contents()
    made.write({part: each for part, each in parts.items() if part != "lora"})
    made.paths["lora"].write_bytes(b"ANOTHER'S")
    with pytest.raises(OSError, match=r"mine_00001_unet.safetensors is there already. Kept: models/palimpsest_st"):
        made.write(parts)
    assert made.paths["lora"].read_bytes() == b"ANOTHER'S" and len(names(models)) == 3


def test_it_is_tried_before_whether_every_one_can_be_written(models):
    (models / "palimpsest_states").touch()
    with pytest.raises(OSError, match=r"mine_00001.safetensors cannot be written \(Not a directory\)"):
        FileSet.new("mine", PLACES)
    (models / "palimpsest_states").unlink()
    FileSet.new("mine", PLACES)
    assert names(models) == []
    with pytest.raises(ValueError, match="no letters or digits"):
        FileSet.new("..", PLACES)


def test_one_that_fails_takes_no_other_with_it_and_is_told_with_what_was_kept(models):
    made, parts = FileSet.new("mine", PLACES), contents()
    parts["thing"] = ({"a": torch.zeros(1 << 18)}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as error:
            made.write(parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == (
        "not all of the training was saved: mine_00001.safetensors cannot be written (File too large): make room on "
        "its disk, or train less. Kept: models/palimpsest_states/mine_00001.safetensors, "
        "models/palimpsest_things/mine_00001_unet.safetensors."
    )
    assert len(names(models)) == 2
    made.write(parts)
    assert len(names(models)) == 3 and all("mine_00001" in name for name in names(models))


def test_too_little_room_is_told_before_and_the_largest_counts_twice_where_it_is_written_again(models, monkeypatch):
    usage, made = files.shutil.disk_usage("."), FileSet.new("mine", PLACES)
    sizes = {"state": 30_000_000, "thing": 10_000_000}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=72_000_000))
    made.require_room(sizes, again=True)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=69_000_000))
    made.require_room(sizes)
    with pytest.raises(OSError, match=r"needs 70 MB, the disk has 69 MB free: make room, or train less"):
        made.require_room(sizes, again=True)
