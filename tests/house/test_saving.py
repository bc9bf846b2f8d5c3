"""Folders of models, files in them, and the Save and Load nodes that are made from a shelf."""

import asyncio
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from palimpsest.nodes import files, saving
from palimpsest.nodes.host import ui

THING = {"weights": torch.arange(6.0).view(2, 3)}


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """An empty models folder; the host's own folders are forgotten."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


SHELF = files.Shelf(
    folder="palimpsest_things",
    format="palimpsest.thing",
    version=3,
    what=("a file of things", "Save Thing"),
    example="my thing",
    room="save fewer",
    put="things",
)


def write(thing, path, note="none") -> None:
    SHELF.write(path, thing, {"note": note})


def read(path):
    return SHELF.read(path, lambda header, tensors: dict(tensors) | {"note": header["note"]})


KEPT = saving.Kept(
    name="Thing",
    id="Thing",
    category="palimpsest/test",
    socket=io.Custom("PALIMPSEST_THING"),
    input="thing",
    shelf=SHELF,
    save=write,
    load=read,
    describe=lambda thing: f"a thing of {thing['weights'].numel()} numbers",
    made_by="Make Thing",
    used_by="Use Thing",
    filename="thing",
)
NOTE = io.String.Input("note", default="none", tooltip="A note.")


class SaveThing(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return saving.save_schema(KEPT, "Saves a thing.", ["keep"], more_inputs=(NOTE,))

    @classmethod
    def execute(cls, thing, filename, note) -> io.NodeOutput:
        return saving.save(cls, KEPT, thing, filename, note=note)


class LoadThing(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        count = io.Int.Output(display_name="count", tooltip="How many numbers.")
        return saving.load_schema(KEPT, "Loads a thing.", ["keep"], more_outputs=(count,))

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return saving.load(cls, KEPT, file, lambda thing: (thing["weights"].numel(),))


# ---------------------------------------------------------------------------------------------------------- the folder


def test_a_new_folder_says_once_what_belongs_there(models):
    SHELF.register()
    note = models / "palimpsest_things" / "put_things_here"
    assert note.read_bytes() == b""
    note.unlink()  # whoever takes it away does not want it
    SHELF.register()
    assert not note.exists()
    assert folder_paths.get_folder_paths("palimpsest_things") == [str(models / "palimpsest_things")]


def test_a_folder_that_others_have_made_known_keeps_their_places_first(models, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder_paths.folder_names_and_paths["palimpsest_things"] = ([str(elsewhere)], {".bin"})
    SHELF.register()
    paths, extensions = folder_paths.folder_names_and_paths["palimpsest_things"]
    assert paths == [str(elsewhere), str(models / "palimpsest_things")]
    assert extensions == {".bin", ".safetensors"}
    assert SHELF.new_path("thing").parent == elsewhere


def test_a_models_folder_that_cannot_be_written_to_is_no_error(models, monkeypatch):
    monkeypatch.setattr(os, "makedirs", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    SHELF.register()
    assert SHELF.listed() == []


def test_a_shelf_the_host_was_not_told_of_lists_nothing(models):
    assert SHELF.listed() == []
    assert files.ModelFolders("palimpsest_unknown", "models", "folder", "put one there").found() == {}


def test_folders_of_models_are_found_one_level_deeper_too(models):
    folders = files.ModelFolders("palimpsest_wholes", "whole_models", "folder of a model", "put one there")
    folders.register()
    for name in ("one", "one/onnx", "maker/two", "maker/deep/three"):  # what lies in one of them is a part of it
        (models / "palimpsest_wholes" / name).mkdir(parents=True)
        (models / "palimpsest_wholes" / name / "config.json").touch()
    (models / "palimpsest_wholes" / "config.json").touch()
    assert sorted(folders.found()) == ["maker/two", "one"]
    assert folders.path("maker/two") == models / "palimpsest_wholes" / "maker" / "two"
    with pytest.raises(
        ValueError, match=r"models/palimpsest_wholes has no folder of a model 'three', it has maker/two"
    ):
        folders.path("three")


# ------------------------------------------------------------------------------------------------------------ the names


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("my cat", "my cat"),
        ("../../etc/passwd", "etc/passwd"),
        ("a\\b:c", "a/bc"),
        (" .hidden. ", "hidden"),
        ("x" * 99, "x" * 80),
    ],
)
def test_a_name_cannot_leave_its_folder(given, name):
    assert files.safe_name(given, "file", "my cat") == name


def test_a_name_without_letters_is_refused():
    with pytest.raises(ValueError, match=r"file name '\.\./' has no letters or digits: write a name such as 'my cat'"):
        files.safe_name("../", "file", "my cat")


def test_files_are_numbered(models):
    SHELF.register()
    first = SHELF.new_path("thing")
    assert first.name == "thing_00001.safetensors"
    first.touch()
    assert SHELF.new_path("thing").name == "thing_00002.safetensors"


# ------------------------------------------------------------------------------------------------------------ the nodes


def test_what_is_saved_is_listed_and_loads_as_it_was(models):
    SHELF.register()
    done = SaveThing.execute(THING, "my :thing", "a note")
    assert done.args == ("my thing_00001.safetensors",)
    assert re.fullmatch(r"my thing_00001\.safetensors, \d+\.\d MB", done.ui["text"][0])
    listed = LoadThing.define_schema().inputs[0].options
    assert listed == [done.args[0]]
    thing, report, count = LoadThing.execute(listed[0]).args
    assert torch.equal(thing["weights"], THING["weights"])
    assert (thing["note"], report, count) == ("a note", "a thing of 6 numbers", 6)


def test_saving_again_takes_the_next_number_and_leaves_the_first(models):
    SHELF.register()
    names = [SaveThing.execute(THING, "thing", note).args[0] for note in ("first", "second")]
    assert names == ["thing_00001.safetensors", "thing_00002.safetensors"]
    assert [LoadThing.execute(name).args[0]["note"] for name in names] == ["first", "second"]


def test_messages_go_under_the_node_that_runs(models, monkeypatch):
    SHELF.register()
    shown = []
    monkeypatch.setattr(ui, "show_text", lambda node, text: shown.append((node, text)))
    made = [
        saving.save(SimpleNamespace(hidden=SimpleNamespace(unique_id="7")), KEPT, THING, "thing"),
        saving.load(SimpleNamespace(hidden=SimpleNamespace(unique_id="8")), KEPT, "thing_00001.safetensors"),
    ]
    assert [output.ui["text"] for output in made] == [[text] for _, text in shown]
    assert [node for node, _ in shown] == ["7", "8"]
    assert shown[0][1].startswith("thing_00001.safetensors, ")
    assert shown[1][1] == "a thing of 6 numbers"


def test_both_schemas_say_everything(models):
    for node in (SaveThing, LoadThing):
        schema = node.GET_SCHEMA()
        assert schema.display_name.split()[0] in ("Save", "Load")
        assert schema.node_id == f"Palimpsest{schema.display_name.replace(' ', '')}"
        assert all(item.tooltip.endswith(".") for item in [*schema.inputs, *schema.outputs])
    assert SaveThing.GET_SCHEMA().is_output_node
    assert [item.id for item in SaveThing.GET_SCHEMA().inputs] == ["thing", "filename", "note"]
    assert [item.display_name for item in LoadThing.GET_SCHEMA().outputs] == ["thing", "report", "count"]


def test_a_folder_in_the_name_is_made_and_listed(models):
    SHELF.register()
    done = SaveThing.execute(THING, "cats/%year%/tom", "a note")
    (name,) = SHELF.listed()
    assert done.args == (name,) and done.ui["text"][0].startswith(name)
    assert re.fullmatch(r"cats[/\\]\d{4}[/\\]tom_00001\.safetensors", name)
    assert LoadThing.execute(name).args[0]["note"] == "a note"
    assert SHELF.fingerprint(name) != f"{name} missing"


def test_a_number_that_another_process_takes_while_saving_is_left_to_it(models, monkeypatch):
    SHELF.register()
    write = files.Shelf.write

    def late(self, path, *rest, **more):
        if path.name == "thing_00001.safetensors":
            path.write_bytes(b"ANOTHER'S")
        write(self, path, *rest, **more)

    monkeypatch.setattr(files.Shelf, "write", late)
    assert SaveThing.execute(THING, "thing", "a").args[0] == "thing_00002.safetensors"
    assert (models / "palimpsest_things" / "thing_00001.safetensors").read_bytes() == b"ANOTHER'S"


def test_a_report_that_cannot_be_built_is_a_damaged_file(models, monkeypatch):
    SHELF.register()
    name = SaveThing.execute(THING, "thing", "a").args[0]
    odd = replace(KEPT, describe=lambda thing: f"{thing['note']:.1f}")
    with pytest.raises(ValueError, match=r"thing_00001.safetensors is damaged: Unknown format code 'f'"):
        saving.load(LoadThing, odd, name)


def test_what_can_be_saved_is_asked_before(models):
    SHELF.register()
    assert saving.checked("thing", SHELF.try_new) is True
    assert saving.checked(None, SHELF.try_new) is True
    assert "no letters" in saving.checked("..", SHELF.try_new)
    assert [path.name for path in (models / "palimpsest_things").iterdir()] == ["put_things_here"]


def test_the_fingerprint_changes_with_the_file_and_knows_one_that_is_gone(models):
    SHELF.register()
    name = SaveThing.execute(THING, "thing", "a").args[0]
    before = SHELF.fingerprint(name)
    os.utime(SHELF.path(name), (1, 1))
    assert SHELF.fingerprint(name) != before
    os.remove(SHELF.path(name))
    assert SHELF.fingerprint(name) == f"{name} missing"
    with pytest.raises(FileNotFoundError):
        LoadThing.execute(name)


# ----------------------------------------------------------------------------------------------------------- the files


def test_a_file_is_whole_or_not_there(models, monkeypatch):
    SHELF.register()

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        SaveThing.execute(THING, "thing", "a")
    assert [path.name for path in (models / "palimpsest_things").iterdir()] == ["put_things_here"]


def test_a_full_disk_is_said_before_anything_is_written(models, monkeypatch):
    SHELF.register()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        OSError, match=r"thing_00001.safetensors needs 0 MB, the disk has 0 MB free: .*, or save fewer\."
    ):
        SaveThing.execute(THING, "thing", "a")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({}, "is not a file of things (no 'palimpsest.thing' mark in it): pick a file that Save Thing wrote"),
        ({"format": "palimpsest.thing", "version": "4"}, "was saved by a newer version of this pack: update"),
        ({"format": "palimpsest.thing", "version": "2"}, "was saved by an early version of this pack"),
        ({"format": "palimpsest.thing", "version": "3"}, "is damaged: its header has no 'note'. Save it again"),
    ],
    ids=["foreign", "newer", "older", "without its header"],
)
def test_what_cannot_be_read_is_refused_with_a_way_out(models, header, says):
    SHELF.register()
    path = models / "palimpsest_things" / "odd.safetensors"
    files.save_file(THING, path, metadata=header)
    with pytest.raises(ValueError, match=re.escape(f"odd.safetensors {says}")):
        LoadThing.execute("odd.safetensors")


def test_a_cut_off_file_is_refused(models):
    SHELF.register()
    path = models / "palimpsest_things" / SaveThing.execute(THING, "thing", "a").args[0]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is cut off or damaged"):
        LoadThing.execute(path.name)


def test_every_shelf_of_the_pack_has_a_folder_of_its_own_and_a_note(models):
    from palimpsest.nodes import extension

    asyncio.run(extension.Palimpsest().get_node_list())
    extension.register_folders()
    ours = [path for path in models.iterdir() if path.is_dir()]
    assert len(ours) > 3
    for folder in ours:
        assert folder.name.startswith("palimpsest_"), folder.name
        assert [path.name for path in folder.iterdir() if not path.is_dir()] and all(
            re.fullmatch(r"put_\w+_here", path.name) for path in folder.iterdir()
        ), folder.name
