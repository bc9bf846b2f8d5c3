"""KV files: whole or absent, checked on reading, never outside their folder."""

import json
import shutil
from collections import namedtuple
from dataclasses import asdict, replace

import folder_paths
import pytest
import torch
from palimpsest.nodes import files as storage
from palimpsest.nodes import headers
from palimpsest.nodes.kv import files as kv_files
from palimpsest.nodes.kv.embeddings import KVEmbeddings, TunedLayer
from palimpsest.nodes.kv.nodes import LoadKV, SaveKV
from safetensors import safe_open
from safetensors.torch import load_file, save_file

LAYERS = (TunedLayer("output", 3, 0, 2, 3, 8), TunedLayer("output", 4, 0, 2, 3, 8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/palimpsest_kv that the host knows."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, kv_files.SHELF.folder, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def kv():
    learned = (None, *(torch.randn(2, 2 * 2 * 2 * (6 + 8)).half() for _ in range(2)))
    source = (None, *(torch.randn(2, 2 * 48).half() for _ in range(2)))
    return KVEmbeddings(
        sigmas=(14.6, 2.5, 0.1, 0.0),
        layers=LAYERS,
        span=(1, 3),
        learned=learned,
        source=source,
        scalars=torch.rand(3, 2, 4, 2),
        noise=torch.randn(2, 4, 4, 6),
        layout="layout",
        rank=2,
        source_rank=0,
        folded=True,
        info={"latent_rmse": 0.01},
    )


def test_embeddings_come_back_bit_by_bit(folder, kv):
    name = SaveKV.execute(kv, "my cat").args[0]
    read, report, noise, _ = LoadKV.execute(name).args
    assert name == "my cat_00001.safetensors"
    assert read.learned[0] is None
    assert all(torch.equal(a, b) for a, b in zip(read.learned[1:], kv.learned[1:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(read.source[1:], kv.source[1:], strict=True))
    assert torch.equal(read.scalars, kv.scalars)
    assert torch.equal(noise["samples"], kv.noise)
    emptied = {"learned": (), "source": (), "scalars": None, "noise": None}
    assert replace(read, **emptied) == replace(kv, **emptied)
    assert (
        report
        == kv_files.describe_kv(kv)
        == "2 picture(s) of 48 x 32, 3 steps, 2 layers, rank 2, 0.0 MB, latent error 1.0 %; modes extend, recompute, "
        "frozen"
    )


def test_a_save_says_where_and_how_much_in_the_history(folder, kv):
    (said,) = SaveKV.execute(kv, "cat").ui["text"]
    assert said == "cat_00001.safetensors, 0.0 MB"


def test_a_second_save_takes_the_next_number(folder, kv):
    assert [SaveKV.execute(kv, "cat").args[0] for _ in range(2)] == ["cat_00001.safetensors", "cat_00002.safetensors"]
    assert kv_files.SHELF.listed() == ["cat_00001.safetensors", "cat_00002.safetensors"]


@pytest.mark.parametrize("prefix", ["../../evil", "/etc/evil", "C:\\evil", "ev/il", "evil\0", "..evil", ".evil."])
def test_no_name_leaves_the_folder(folder, prefix):
    path = kv_files.SHELF.new_path(prefix)
    assert path.resolve().is_relative_to(folder.resolve()) and ".." not in path.parts
    assert "evil" in path.name or path.name.startswith("il")


@pytest.mark.parametrize("prefix", ["", "..", "///", " . "])
def test_a_name_without_letters_is_refused(folder, prefix):
    with pytest.raises(ValueError, match="no letters or digits"):
        kv_files.SHELF.new_path(prefix)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(folder, kv, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 10))
    with pytest.raises(OSError, match="make room"):
        SaveKV.execute(kv, "cat")
    assert not list(folder.iterdir())


def test_a_write_that_breaks_leaves_nothing(folder, kv, monkeypatch):
    def breaks(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "save_file", breaks)
    with pytest.raises(OSError, match="No space"):
        SaveKV.execute(kv, "cat")
    assert not list(folder.iterdir())


def read(path):
    return kv_files.load_kv(str(path))


def test_foreign_newer_cut_and_damaged_files_are_refused_by_name_and_reason(folder, kv):
    good = folder / "good.safetensors"
    kv_files.save_kv(kv, good)
    cut = folder / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors is cut off or damaged"):
        read(cut)
    text = folder / "text.safetensors"
    text.write_text("this is not a tensor file, whatever its name says")
    with pytest.raises(ValueError, match=r"text\.safetensors is cut off or damaged"):
        read(text)
    foreign = folder / "lora.safetensors"
    save_file({"lora_up": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match=r"lora\.safetensors is not a file of KV embeddings"):
        read(foreign)
    newer = folder / "newer.safetensors"
    save_file({"x": torch.zeros(1)}, newer, metadata={"format": kv_files.SHELF.format, "version": "99"})
    with pytest.raises(ValueError, match="newer version of this pack"):
        read(newer)
    older = folder / "older.safetensors"
    save_file({"x": torch.zeros(1)}, older, metadata={"format": kv_files.SHELF.format, "version": "1"})
    with pytest.raises(ValueError, match=r"early version of this pack.*tune the picture again"):
        read(older)
    hollow = folder / "hollow.safetensors"
    save_file(
        {"x": torch.zeros(1)},
        hollow,
        metadata={"format": kv_files.SHELF.format, "version": str(kv_files.SHELF.version)},
    )
    with pytest.raises(ValueError, match=r"hollow\.safetensors is damaged"):
        read(hollow)
    shuffled = folder / "shuffled.safetensors"
    kv_files.save_kv(replace(kv, layers=kv.layers[:1]), shuffled)
    with pytest.raises(ValueError, match="do not fit"):
        read(shuffled)
    poisoned = folder / "poisoned.safetensors"
    kv_files.save_kv(replace(kv, scalars=kv.scalars * float("nan")), poisoned)
    with pytest.raises(ValueError, match="NaN"):
        read(poisoned)


def test_only_safetensors_are_listed(folder, kv):
    (folder / "weights.pt").write_bytes(b"x")
    SaveKV.execute(kv, "cat")
    assert kv_files.SHELF.listed() == ["cat_00001.safetensors"]


# ---- what a header may say


def edited(path, tensors=None, **header):
    """A KV file with some of its header or tensors changed; None: taken away."""
    with safe_open(path, framework="pt") as file:
        said = dict(file.metadata())
    found = load_file(path) | (tensors or {})
    said |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    save_file({k: v for k, v in found.items() if v is not None}, path, metadata=said)
    return path


LAYER = asdict(LAYERS[0])
OTHER = asdict(LAYERS[1])
NONSENSE = {
    "newer": ({"version": "3"}, "newer version of this pack"),
    "version in words": ({"version": "two"}, "early version of this pack"),
    "superscript version": ({"version": "\u00b2"}, "early version of this pack"),
    "endless version": ({"version": "9" * 5000}, "early version of this pack"),
    "sigmas are words": ({"sigmas": ["a", "b", "c", "d"]}, "its sigmas should be a number, it is 'a'"),
    "sigmas are null": ({"sigmas": [None] * 4}, "its sigmas should be a number, it is None"),
    "sigmas are NaN": ({"sigmas": "[NaN, NaN, NaN, NaN]"}, "its sigmas should be from 0 to .*, it is nan"),
    "sigmas rise": ({"sigmas": [0, 0.1, 2.5, 14.6]}, "sigmas should be two or more that fall"),
    "sigmas below 0": ({"sigmas": [14, 1, 0, -1]}, "its sigmas should be from 0"),
    "sigmas are a record": ({"sigmas": {"a": 1}}, "its sigmas should be a list"),
    "sigmas are a text": ({"sigmas": '"abcd"'}, "its sigmas should be a list, it is 'abcd'"),
    "sigmas are infinite": ({"sigmas": "[Infinity, 1, 0.1, 0]"}, "its sigmas should be from 0 to .*, it is inf"),
    "a sigma beyond floats": ({"sigmas": f"[{'9' * 400}, 1, 0.1, 0]"}, "its sigmas should be from 0 to"),
    "sigmas are true": ({"sigmas": [True, True, False, False]}, "its sigmas should be a number, it is True"),
    "one sigma": ({"sigmas": [1.0]}, "its 1 sigmas should be two or more"),
    "span beyond the steps": ({"span": [1, 99]}, "its span should be from 0 to 3, it is 99"),
    "span before them": ({"span": [-9, 3]}, "its span should be from 0 to 3, it is -9"),
    "span in words": ({"span": ["a", "b"]}, "its span should be a whole number"),
    "span of three": ({"span": [0, 1, 2]}, "its span should hold 2 numbers, it holds 3"),
    "span is null": ({"span": "null"}, "its span should be a list"),
    "span backwards": ({"span": [2, 1]}, "its span should not end before it begins"),
    "layers are a record": ({"layers": {"a": 1}}, "its layers should be a list"),
    "no layers": ({"layers": []}, "its 0 layers should be one or more"),
    "a layer has more": ({"layers": [LAYER | {"evil": 1}, OTHER]}, "its layers has 'evil'"),
    "a layer has less": ({"layers": [{"block": "output"}, OTHER]}, "its layers lacks 'channels'"),
    "a layer twice": ({"layers": [LAYER, LAYER]}, "each once"),
    "a negative layer": ({"layers": [LAYER | {"height": -2, "width": -3}, OTHER]}, "layers's height should be from 1"),
    "an empty layer": ({"layers": [LAYER | {"channels": 0}, OTHER]}, "layers's channels should be from 1"),
    "a layer's height in words": ({"layers": [LAYER | {"height": "2"}, OTHER]}, "height should be a whole number"),
    "a broken layer": ({"layers": [LAYER | {"height": 2.0}, OTHER]}, "height should be a whole number, it is 2.0"),
    "a layer of no U-Net": ({"layers": [LAYER | {"block": "<script>"}, OTHER]}, "name a block '<script>', there are"),
    "a block is a list": ({"layers": [LAYER | {"block": ["a"]}, OTHER]}, "block should be a text"),
    "negative rank": ({"rank": [-3, 0]}, "its rank should be from 0 to 65536, it is -3"),
    "huge rank": ({"rank": [10**30, 0]}, "its rank should be from 0 to 65536, it is 1000"),
    "rank in words": ({"rank": ["2", "0"]}, "its rank should be a whole number"),
    "one rank": ({"rank": [2]}, "its rank should hold 2 numbers"),
    "ranks are null": ({"rank": [None, None]}, "its rank should be a whole number"),
    "another rank": ({"rank": [1, 0]}, "learned.0001 .* and its header do not fit"),
    "folded in words": ({"folded": '"false"'}, "its folded should be true or false, it is 'false'"),
    "folded is a list": ({"folded": "[]"}, "its folded should be true or false"),
    "info is a list": ({"info": "[]"}, "its info should be a record"),
    "info is null": ({"info": "null"}, "its info should be a record"),
    "info is a text": ({"info": '"latent_rmse"'}, "its info should be a record"),
    "error in words": ({"info": {"latent_rmse": "<b>x"}}, "latent_rmse should be a number, it is '<b>x'"),
    "error is null": ({"info": {"latent_rmse": None}}, "latent_rmse should be a number"),
    "psnr in words": ({"info": {"latent_rmse": 0.1, "pixel_psnr": "x"}}, "pixel_psnr should be a number"),
    "deep info": ({"info": "[" * 100_000}, "is nested too deeply|cannot be read"),
    "info not so deep": ({"info": '{"a": ' + "[" * 50 + "]" * 50 + "}"}, "its info is nested too deeply"),
    "endless number": ({"info": "1" * 5000}, "its info"),
    "layout of tags": ({"layout": "<img src=x onerror=alert(1)>"}, "its layout is no name"),
    "endless layout": ({"layout": "x" * 10_000}, "its layout is no name"),
}


@pytest.mark.parametrize(("header", "says"), NONSENSE.values(), ids=list(NONSENSE))
def test_a_header_of_nonsense_is_refused_with_what_is_wrong(folder, kv, header, says):
    name = SaveKV.execute(kv, "odd").args[0]
    edited(folder / name, **header)
    with pytest.raises(ValueError, match=says) as error:
        LoadKV.execute(name)
    assert str(error.value).startswith(name) and len(str(error.value)) < 400


@pytest.mark.parametrize("missing", ["sigmas", "layers", "span", "rank", "folded", "layout", "info"])
def test_a_header_without_one_of_its_values_is_refused(folder, kv, missing):
    path = folder / SaveKV.execute(kv, "odd").args[0]
    with safe_open(path, framework="pt") as file:
        said = {key: value for key, value in file.metadata().items() if key != missing}
    save_file(load_file(path), path, metadata=said)
    with pytest.raises(ValueError, match=f"its header has no '{missing}'"):
        read(path)


PIECE = 2 * 2 * 2 * (6 + 8)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"scalars": torch.ones(3, 2, 4, 2, dtype=torch.int64)}, "its scalars holds I64 numbers"),
        ({"scalars": torch.ones(3, 2, 4, 2, dtype=torch.complex64)}, "its scalars holds C64 numbers"),
        ({"scalars": torch.ones(3, 2, 4, 1)}, "do not fit"),
        ({"noise": torch.zeros(2, 4, 4, 6, dtype=torch.bool)}, "its noise holds BOOL numbers"),
        ({"noise": torch.zeros(2, 4, 0, 0)}, "its noise .* do not fit"),
        ({"noise": torch.zeros(2, 4, 24)}, "its noise .* do not fit"),
        ({"noise": torch.zeros(0, 4, 4, 6), "scalars": torch.ones(3, 2, 4, 0)}, "its noise .* do not fit"),
        ({"learned.0001": torch.zeros(2, PIECE, dtype=torch.int8)}, "holds I8 numbers"),
        ({"learned.0001": torch.zeros(2, PIECE).to(torch.float8_e4m3fn)}, "holds F8_E4M3 numbers"),
        ({"learned.0002": torch.full((2, PIECE), torch.inf).half()}, "its learned.0002 holds NaN or infinite"),
        ({"learned.0003": torch.zeros(2, PIECE).half()}, "do not belong to it, 'learned.0003' for one"),
        ({"evil": torch.zeros(3)}, "1 of its tensors do not belong to it, 'evil' for one"),
        ({f"{part}.000{i}": None for part in ("learned", "source") for i in (1, 2)}, "holds no keys and values"),
        ({"noise": None}, "has no tensor 'noise'"),
    ],
)
def test_tensors_of_nonsense_are_refused(folder, kv, tensors, says):
    path = folder / SaveKV.execute(kv, "odd").args[0]
    with pytest.raises(ValueError, match=says):
        read(edited(path, tensors))


def test_what_does_not_fit_is_told_before_its_tensors_are_read(folder, kv, monkeypatch):
    path = edited(folder / SaveKV.execute(kv, "odd").args[0], rank=[5, 0])
    monkeypatch.setattr(headers.Tensors, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="do not fit"):
        read(path)


def test_keyframes_and_a_measurement_that_was_none_are_no_nonsense(folder, kv):
    path = folder / SaveKV.execute(replace(kv, info={"latent_rmse": float("nan")}), "sparse").args[0]
    edited(path, {"learned.0001": None, "source.0001": None})
    assert "latent error nan" in kv_files.describe_kv(read(path))


def test_a_folder_with_the_name_of_a_file_is_no_file(folder, kv):
    (folder / "x.safetensors").mkdir()
    (folder / "cat_00001.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"x\.safetensors is a folder: pick a file that Save KV wrote"):
        read(folder / "x.safetensors")
    assert SaveKV.execute(kv, "cat").args[0] == "cat_00002.safetensors"
    assert kv_files.SHELF.listed() == ["cat_00002.safetensors"]


def test_a_folder_in_the_name_is_made_listed_and_loaded_from(folder, kv):
    name = SaveKV.execute(kv, "pets/%year%/cat").args[0]
    assert name.startswith("pets") and (folder / name).is_file()
    assert kv_files.SHELF.listed() == [name]
    assert LoadKV.execute(name).args[0].layout == "layout"
    assert LoadKV.fingerprint_inputs(name) != f"{name} missing"


def test_a_name_that_cannot_be_saved_under_is_told_when_the_graph_is_queued(folder):
    assert SaveKV.validate_inputs("pets/cat") is True
    assert SaveKV.validate_inputs(None) is True, "a linked name is known later"
    assert "no letters or digits" in SaveKV.validate_inputs("..")
    assert "stands for nothing here" in SaveKV.validate_inputs("%seed%")
    (folder / "full").touch()
    assert "full_" not in SaveKV.validate_inputs("full/cat") and "Not a directory" in SaveKV.validate_inputs("full/cat")
    assert [path.name for path in folder.iterdir()] == ["full"]
