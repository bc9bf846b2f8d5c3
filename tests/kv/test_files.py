"""KV files: whole or absent, checked on reading, never outside their folder."""

import shutil
from collections import namedtuple
from dataclasses import replace

import folder_paths
import pytest
import torch
from palimpsest.nodes import files as storage
from palimpsest.nodes.kv import files as kv_files
from palimpsest.nodes.kv.embeddings import KVEmbeddings, TunedLayer
from palimpsest.nodes.kv.nodes import LoadKV, SaveKV
from safetensors.torch import save_file

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
    read, report, noise = LoadKV.execute(name).args
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
    assert path.parent == folder
    assert "evil" in path.name


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
