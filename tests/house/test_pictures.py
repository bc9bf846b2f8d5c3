"""The templates' pictures: offered to Load Image once, whole, and never over a file of the user's."""

from __future__ import annotations

import logging

import pytest
from palimpsest.nodes import pictures
from palimpsest.nodes.keep_outside.compositing import BLACK
from PIL import Image

NAMES = sorted(path.name for path in pictures.PICTURES.glob("*.webp"))


def test_a_folder_gets_each_picture_once(tmp_path):
    assert pictures.offer(tmp_path) == NAMES
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    assert pictures.offer(tmp_path) == []


def test_a_file_of_that_name_is_left_alone(tmp_path):
    (tmp_path / NAMES[0]).write_text("mine")
    (tmp_path / NAMES[1]).symlink_to(tmp_path / "gone")
    assert pictures.offer(tmp_path) == NAMES[2:]
    assert (tmp_path / NAMES[0]).read_text() == "mine"


def test_a_folder_that_is_not_there_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert pictures.offer(tmp_path / "none") == []
    assert "pictures cannot be put into" in caplog.text


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(pictures.shutil, "copyfile", full)
    assert pictures.offer(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_each_is_small_and_of_a_size_that_models_take(name):
    path = pictures.PICTURES / name
    assert path.stat().st_size < 200_000
    with Image.open(path) as picture:
        assert all(side % 64 == 0 for side in picture.size)


def test_a_masked_picture_loads_with_its_colours_and_its_mask(comfy_host_path, monkeypatch):
    import folder_paths

    import nodes

    monkeypatch.setattr(folder_paths, "input_directory", str(pictures.PICTURES))
    plain, _ = nodes.LoadImage().load_image("palimpsest_coffee.webp")
    masked, mask = nodes.LoadImage().load_image("palimpsest_coffee_masked.webp")
    assert mask.shape == masked.shape[:3]
    assert 0.3 < mask.mean() < 0.6
    assert all(value < BLACK or value == 1 for value in mask.unique().tolist())
    assert (plain - masked).abs().mean() < 0.02
