"""Blend weights on disk: they come back as they were, and nonsense is refused."""

from pathlib import Path

import pytest
import tiny_models
import torch
from palimpsest.nodes.feature_blend import files
from palimpsest.nodes.feature_blend.nodes import LoadBlendWeights, SaveBlendWeights
from palimpsest.nodes.feature_blend.weights import BlendWeights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The host's folder list with an empty folder of ours."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, files.SHELF.folder, ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    return tmp_path


WEIGHTS = BlendWeights({"output 0": 0.25, "out": 0.75}, "0123456789abcdef", {"losses": [2.0, 1.0], "steps": 2})


def test_weights_come_back_from_a_file(folder):
    (name,) = tiny_models.execute(SaveBlendWeights, blend_weights=WEIGHTS, filename="../my: garden")
    assert name == "my garden_00001.safetensors" and (folder / name).exists()
    assert tiny_models.execute(SaveBlendWeights, blend_weights=WEIGHTS, filename="my garden")[0].endswith(
        "_00002.safetensors"
    )
    loaded, report = tiny_models.execute(LoadBlendWeights, file=name)
    assert loaded == WEIGHTS and "output 0 0.25, out 0.75" in report
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"] * 2
    assert name in files.SHELF.listed()


def test_a_name_without_letters_is_refused(folder):
    with pytest.raises(ValueError, match="has no letters or digits"):
        files.SHELF.new_path("../..")


def saved(folder, alphas=None, **header):
    """A file with some of its header or its tensor changed."""
    from safetensors.torch import save_file

    usual = {"format": files.SHELF.format, "version": "1", "features": '["out"]', "layout": "x", "info": "{}"}
    path = folder / "a.safetensors"
    metadata = {key: value for key, value in (usual | header).items() if value is not None}
    save_file({"alpha": torch.tensor([0.5]) if alphas is None else alphas}, path, metadata=metadata)
    return str(path)


def test_losses_that_were_no_numbers_are_a_record_of_the_tuning(folder):
    saved(folder, info='{"losses": [2.0, NaN]}')
    assert "loss 2.000 at first, nan at last" in tiny_models.execute(LoadBlendWeights, file="a.safetensors")[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": None}, "not a file of blend weights"),
        ({"format": "palimpsest.kv"}, "not a file of blend weights"),
        ({"version": "0"}, "an early version of this pack"),
        ({"version": "2"}, "a newer version of this pack"),
        ({"features": '["out", "middle"]'}, "do not fit its list"),
        ({"features": "[out"}, "damaged"),
        ({"layout": None}, "damaged"),
        ({"alphas": torch.tensor([1.5])}, "outside of 0 to 1"),
        ({"alphas": torch.tensor([float("nan")])}, "outside of 0 to 1"),
        ({"alphas": torch.tensor([1])}, "its alpha holds I64 numbers"),
        ({"alphas": torch.tensor([[0.5]])}, "do not fit its list"),
        ({"alphas": torch.tensor(0.5)}, "do not fit its list"),
        ({"alphas": torch.tensor([]), "features": "[]"}, "its alpha .* do not fit"),
        ({"features": '["out", "out"]', "alphas": torch.tensor([0.5, 0.5])}, "do not fit its list"),
        ({"features": "[1]"}, "its features should be a text, it is 1"),
        ({"features": '{"out": 1}'}, "its features should be a list"),
        ({"features": '"o"'}, "its features should be a list"),
        ({"version": "\u00b2"}, "an early version of this pack"),
        ({"layout": "<b>"}, "its layout is no name"),
        ({"info": "[]"}, "its info should be a record"),
        ({"info": '{"losses": "abc"}'}, "info's losses should be a list"),
        ({"info": '{"losses": ["a"]}'}, "info's losses should be a number, it is 'a'"),
        ({"info": '{"losses": [null]}'}, "info's losses should be a number, it is None"),
        ({"info": "[" * 100_000}, "its info"),
    ],
)
def test_foreign_newer_and_damaged_files_are_refused(folder, changes, said):
    with pytest.raises(ValueError, match=said):
        tiny_models.execute(LoadBlendWeights, file=Path(saved(folder, **changes)).name)


def test_a_cut_off_file_is_refused(folder):
    path = saved(folder)
    content = Path(path).read_bytes()
    for length in (0, 7, len(content) // 2, len(content) - 1):
        Path(path).write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut off or damaged"):
            files.load(path)
