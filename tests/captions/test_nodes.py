"""Caption Helper in the host: captions from files and texts, beside the host's own loader of folders."""

import folder_paths
import pytest
import tiny_models
import torch
from comfy_extras.nodes_dataset import LoadImageTextDataSetFromFolderNode
from palimpsest.nodes.captions import beside, helping
from palimpsest.nodes.captions.nodes import CaptionHelper
from PIL import Image


def run(images, **chosen):
    """The node behind its border, on lists: (captions, sheet, report)."""
    given = {name: value if isinstance(value, list) else [value] for name, value in chosen.items()}
    return tiny_models.execute(CaptionHelper, images=images, **given)


def batch(count):
    return [tiny_models.picture(count)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five pictures in ComfyUI's input folder, two of them in 2_cats, with captions of both kinds and without."""
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    inside = tmp_path / "mine" / "2_cats"
    inside.mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.JPG", "c.d.webp", "2_cats/e.png", "2_cats/f.png"]):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(tmp_path / "mine" / name, "PNG")
    (tmp_path / "mine" / "a.txt").write_text("a painting of\n a tree", encoding="utf-8")
    (tmp_path / "mine" / "b.caption").write_text("a \u6c34 fall, ink wash", encoding="utf-8")
    (inside / "e.caption").write_bytes("a hut".encode("utf-16"))
    return tmp_path / "mine"


def test_files_are_read_for_the_pictures_that_the_hosts_loader_gives(folder):
    pictures, texts = LoadImageTextDataSetFromFolderNode.execute("mine").args
    captions, sheet, report = run(pictures, captions=texts, folder="mine")
    found = [round(float(picture[0, 0, 0, 0]) * 255 / 40) for picture in pictures]  # which picture each is
    said = ["a tree", "a \u6c34 fall", "", "a hut", ""]
    assert captions == [said[number] for number in found]
    assert len(captions) == 7
    assert "7 pictures; " in report and "1 given" in report and "3 from files" in report
    assert "3 without a caption" in report
    assert sheet.shape[0] == 1 and sheet.shape[3] == 3 and sheet.shape[1] > 7 * 144


def test_what_is_typed_comes_before_files(folder):
    captions, *_ = run(batch(7), captions="a photo of a dog", folder="mine", trigger="zwx", drop_style=False)
    assert captions == ["zwx, a photo of a dog"] * 7


def test_lines_are_captions_in_order_and_words_can_be_chosen():
    captions, _, report = run(
        batch(2), captions="a print of a cat\n\na wall, a picture", drop_words="cat", keep_words="picture,print"
    )
    assert captions == ["a print", "a wall, a picture"]
    assert "left out of 1: cat (1)" in report


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"captions": "a\nb"}, "captions has 2 texts for 3 pictures"),
        ({"folder": "mine"}, "has 7 pictures and images 3"),
        ({"folder": "../secret"}, "there is no folder '../secret'"),
    ],
)
def test_what_does_not_fit_is_told(folder, chosen, message):
    with pytest.raises(ValueError, match=message):
        run(batch(3), **chosen)


def test_a_caption_that_is_no_text_or_lies_elsewhere_is_refused(folder):
    (folder / "a.txt").write_bytes(b"\xff\xd8 no text")
    with pytest.raises(ValueError, match=r"'a\.txt' cannot be read"):
        run(batch(7), folder="mine")
    (folder / "a.txt").unlink()
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "a.txt").symlink_to(folder.parent / "secret.txt")
    with pytest.raises(ValueError, match="link out of its folder"):
        run(batch(7), folder="mine")
    (folder / "a.txt").unlink()
    (folder / "a.txt").write_text("x" * (beside.MOST_BYTES + 1))
    with pytest.raises(ValueError, match="more than"):
        run(batch(7), folder="mine")


def test_a_vision_language_model_describes_what_has_no_caption(tmp_path):
    pytest.importorskip("transformers")
    import tiny_vlm
    from palimpsest.nodes.multimodal import MultimodalEncoder
    from palimpsest.nodes.multimodal.vlm import load_vlm

    encoder = MultimodalEncoder(load_vlm(tiny_vlm.write(tmp_path / "seer")), None)
    captions, _, report = run(
        batch(2), captions=["a cat", ""], drop_style=False, question="what", max_tokens=4, multimodal_encoder=encoder
    )
    assert captions[0] == "a cat" and captions[1]
    assert "1 described by a model" in report


def test_a_model_describes_only_what_has_no_caption():
    pictures = list(torch.zeros(2, 1, 8, 8, 3))
    found = helping.captions_for(
        pictures,
        ["a cat", ""],
        helping.CaptionSettings(),
        lambda picture: f"a photo of a {len(picture)} x {picture.shape[1]} dog",
    )
    assert [(c.text, c.source) for c in found] == [("a cat", "given"), ("a 1 x 8 dog", "described by a model")]
