"""Edit Report as a node, with the host's own CLIP classes filled with random weights."""

import json
import math

import folder_paths
import pytest
import tiny_models
import torch
from palimpsest.nodes.edit_report import drawing, measuring
from palimpsest.nodes.edit_report.nodes import WIRED, EditReport


@pytest.fixture(autouse=True)
def previews_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))


def report(**values):
    """(report, picture, numbers of the JSON, numbers with a socket by name)."""
    text, picture, numbers, *wired = tiny_models.execute(EditReport, **values)
    return text, picture, json.loads(numbers), dict(zip(WIRED, wired, strict=True))


def means(**values):
    """The means by name, as the JSON has them; infinity as a number."""
    return {name: math.inf if value == "inf" else value for name, value in report(**values)[2]["mean"].items()}


def vision(width: int = 16):
    """A CLIP_VISION of the host's own class, small and random."""
    import comfy.clip_vision

    config = {
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 24, "intermediate_size": 32,
        "layer_norm_eps": 1e-5, "num_attention_heads": 2, "num_hidden_layers": 3, "num_channels": 3, "image_size": 28,
        "patch_size": 14, "projection_dim": width,
    }  # fmt: skip
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        model = comfy.clip_vision.ClipVisionModel(str(path))
    torch.manual_seed(0)
    with torch.no_grad():
        tiny_models.fill(model.model)
    return model


class TextModel(torch.nn.Module):
    """The text side of a CLIP as far as the report asks for it."""

    def __init__(self, projection: torch.Tensor):
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.text_projection = torch.nn.Linear(*projection.shape, bias=False)
        self.transformer.text_projection.weight = torch.nn.Parameter(projection, requires_grad=False)


class Clip:
    """Stands for a host CLIP: tokens are letters, the pooled text is their histogram, projected."""

    def __init__(self, projection: torch.Tensor):
        self.cond_stage_model = TextModel(projection)

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) % len(self.cond_stage_model.transformer.text_projection.weight) for letter in text]

    def encode_from_tokens(self, tokens: list[int], return_pooled: bool):
        assert return_pooled
        projection = self.cond_stage_model.transformer.text_projection
        counts = torch.bincount(torch.tensor(tokens), minlength=projection.in_features).float()
        return None, projection(counts[None])


def random_projection(width: int = 16) -> torch.Tensor:
    return torch.randn(width, width, generator=torch.Generator().manual_seed(5)) * 0.1


SOURCE = tiny_models.picture(2, 40, 48)
EDITED = (SOURCE + 0.1 * tiny_models.picture(2, 40, 48, seed=9)).clamp(0, 1)
MASK = torch.zeros(1, 40, 48)
MASK[:, 10:30, 10:30] = 1.0


def test_an_untouched_picture_is_equal():
    _, picture, numbers, wired = report(source=SOURCE, edited=SOURCE)
    assert numbers["mean"]["psnr"] == "inf" and numbers["each"]["psnr"] == ["inf", "inf"]
    assert numbers["mean"]["ssim"] == pytest.approx(1.0)
    assert wired["background_psnr"] == math.inf  # without a mask everything is background
    assert picture.ndim == 4 and picture.shape[-1] == 3


def test_what_is_not_measured_is_nan_and_missing_from_the_json():
    text, _, numbers, wired = report(source=SOURCE, edited=EDITED)
    assert math.isnan(wired["clip_text"]) and math.isnan(wired["frame_change"])
    assert set(numbers["mean"]) == set(numbers["each"]) == {"psnr", "ssim"}
    assert wired["background_psnr"] == pytest.approx(numbers["mean"]["psnr"])
    assert "CLIP" not in text


def test_the_background_is_what_lies_outside_the_mask():
    edited = torch.where(MASK[..., None] > 0, EDITED, SOURCE)
    *_, numbers, wired = report(source=SOURCE, edited=edited, mask=MASK)
    assert wired["background_psnr"] == math.inf and numbers["mean"]["background_psnr"] == "inf"
    assert numbers["mean"]["background_ssim"] > numbers["mean"]["ssim"]
    assert numbers["mean"]["psnr"] < 100


def test_a_mask_over_everything_leaves_no_background():
    text, *_, numbers, wired = report(source=SOURCE, edited=EDITED, mask=torch.ones(1, 8, 8))
    assert math.isnan(wired["background_psnr"]) and "background_psnr" not in numbers["mean"]
    assert numbers["each"]["background_psnr"] == [None, None]
    assert "| background PSNR (dB) | - |" in text


def test_another_size_is_resized_and_said():
    done = EditReport.execute(SOURCE, tiny_models.picture(2, 64, 64), prompt="", source_prompt="", is_clip=False)
    assert "resized" in done.args[0]
    assert "resized" in done.ui["text"][0]


def test_what_was_measured_is_in_the_history_beside_the_picture():
    done = EditReport.execute(SOURCE, EDITED, prompt="", source_prompt="", is_clip=True)
    numbers = json.loads(done.args[2])["mean"]
    assert done.ui["text"] == [
        f"PSNR {numbers['psnr']:.2f} dB, SSIM {numbers['ssim']:.4f}, frame change {numbers['frame_change']:.3f}"
    ]
    assert len(done.ui["images"]) == 1


def test_every_input_reaches_what_is_measured(monkeypatch):
    seen, measure = [], measuring.measure
    monkeypatch.setattr(measuring, "measure", lambda edit, embedder: seen.append((edit, embedder)) or measure(edit))
    chosen = {"prompt": "a red cat", "source_prompt": "a cat", "is_clip": True}
    eyes, letters = vision(), Clip(random_projection())
    EditReport.execute(SOURCE, EDITED, MASK, 1 - SOURCE, eyes, letters, **chosen)
    ((edit, embedder),) = seen
    assert {name: getattr(edit, name) for name in chosen} == chosen
    given = {"source": SOURCE, "edited": EDITED, "ideal": 1 - SOURCE, "mask": MASK.expand(2, -1, -1)}
    assert all(torch.equal(getattr(edit, name), tensor) for name, tensor in given.items())
    assert (embedder.vision, embedder.clip) == (eyes, letters)


def test_the_ideal_is_measured_inside_too():
    found = means(source=SOURCE, edited=EDITED, ideal=EDITED[:1].expand(2, -1, -1, -1), mask=MASK)
    assert found["ideal_psnr"] > found["psnr"]
    assert "ideal_inside_psnr" in found


def test_one_source_serves_a_batch_of_edits():
    _, _, numbers, _ = report(source=SOURCE[:1], edited=EDITED)
    assert len(numbers["each"]["psnr"]) == 2


def test_structure_and_texts_with_the_two_sides_of_a_clip():
    given = {"prompt": "a red cat", "source_prompt": "a cat", "clip_vision": vision(), "is_clip": True}
    *_, numbers, wired = report(source=SOURCE, edited=EDITED, clip=Clip(random_projection()), **given)
    found = numbers["mean"]
    assert found["structure"] > 0
    assert 0 <= found["clip_text"] <= 100 and -1 <= found["clip_direction"] <= 1
    assert -1 <= found["clip_temporal"] <= 1 and found["frame_change"] > 0
    assert (wired["clip_text"], wired["frame_change"]) == (found["clip_text"], found["frame_change"])


def test_a_still_clip_is_perfectly_consistent():
    still = SOURCE[:1].expand(3, -1, -1, -1)
    moving = torch.cat([SOURCE, EDITED[:1]])
    found = means(source=moving, edited=still, clip_vision=vision(), is_clip=True)
    assert found["clip_temporal"] == pytest.approx(1.0)
    assert found["frame_change"] == 0.0


@pytest.mark.parametrize("weight", [torch.eye(16), torch.zeros(16, 16), torch.full((16, 16), torch.nan)])
def test_a_text_model_without_its_projection_is_refused(weight):
    with pytest.raises(ValueError, match="without the projection"):
        report(source=SOURCE, edited=EDITED, prompt="a cat", clip_vision=vision(), clip=Clip(weight))


def test_two_sides_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="texts have 12 numbers, the clip_vision's pictures 16"):
        report(source=SOURCE, edited=EDITED, prompt="a cat", clip_vision=vision(), clip=Clip(random_projection(12)))


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_pictures_and_those_with_transparency_are_measured(channels):
    source, edited = (each[..., :1].repeat(1, 1, 1, channels) for each in (SOURCE, EDITED))
    wanted = means(source=SOURCE[..., :1].repeat(1, 1, 1, 3), edited=EDITED[..., :1].repeat(1, 1, 1, 3))
    assert means(source=source, edited=edited) == wanted
    assert means(source=source, edited=EDITED)["psnr"] < wanted["psnr"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": torch.cat([SOURCE, SOURCE[:1]])}, "source has 3 pictures, edited has 2"),
        ({"edited": EDITED * torch.nan}, "edited holds NaN or infinite values"),
        ({"edited": EDITED[:1], "is_clip": True}, "a single picture"),
        ({"clip": Clip(random_projection())}, "connect clip_vision"),
        ({"mask": torch.ones(3, 8, 8)}, "the mask has 3 pictures"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        report(**{"source": SOURCE, "edited": EDITED} | changes)


def test_a_report_of_many_pictures_shows_their_mean_only():
    many = tiny_models.picture(1, 16, 16).expand(12, -1, -1, -1)
    text, picture, *_ = report(source=many, edited=many.clone().mul_(0.9))
    assert "| mean |" in text and "| 9 |" not in text
    assert picture.shape[1] == drawing.LABEL + drawing.MOST_ROWS * (256 + drawing.GAP) + drawing.CELL


def test_the_schema_offers_what_people_wire():
    names = [output.display_name for output in EditReport.define_schema().outputs]
    assert names == ["report", "picture", "numbers", *WIRED]
    assert len(names) == 6
    assert set(WIRED) <= set(measuring.MEASURES)
