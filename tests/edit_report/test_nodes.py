"""Edit Report as a node, with the host's own CLIP classes filled with random weights."""

import json
import math

import folder_paths
import pytest
import tiny_models
import torch
from palimpsest.nodes.edit_report import nodes as edit_report
from palimpsest.nodes.edit_report.nodes import MEASURES, EditReport

NAMES = list(MEASURES)


@pytest.fixture(autouse=True)
def previews_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))


def report(**values):
    """(report, plot, numbers, means by name)."""
    text, picture, numbers, *means = tiny_models.execute(EditReport, **values)
    return text, picture, json.loads(numbers), dict(zip(NAMES, means, strict=True))


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
    _, plot, numbers, means = report(source=SOURCE, edited=SOURCE)
    assert means["psnr"] == math.inf and means["ssim"] == pytest.approx(1.0)
    assert numbers["mean"]["psnr"] == "inf" and numbers["each"]["psnr"] == ["inf", "inf"]
    assert plot.ndim == 4 and plot.shape[-1] == 3


def test_what_is_not_measured_is_nan_and_missing_from_the_json():
    text, _, numbers, means = report(source=SOURCE, edited=EDITED)
    assert math.isnan(means["clip_text"]) and math.isnan(means["background_psnr"])
    assert set(numbers["mean"]) == {"psnr", "ssim"}
    assert "CLIP" not in text


def test_the_background_is_what_lies_outside_the_mask():
    edited = torch.where(MASK[..., None] > 0, EDITED, SOURCE)
    *_, means = report(source=SOURCE, edited=edited, mask=MASK)
    assert means["background_psnr"] == math.inf and means["psnr"] < 100


def test_a_mask_over_everything_leaves_no_background():
    text, *_, means = report(source=SOURCE, edited=EDITED, mask=torch.ones(1, 8, 8))
    assert math.isnan(means["background_psnr"])
    assert "| background PSNR (dB) | - |" in text


def test_another_size_is_resized_and_said():
    text, *_ = report(source=SOURCE, edited=tiny_models.picture(2, 64, 64))
    assert "resized" in text


def test_the_ideal_is_measured_inside_too():
    *_, means = report(source=SOURCE, edited=EDITED, ideal=EDITED[:1].expand(2, -1, -1, -1), mask=MASK)
    assert means["ideal_psnr"] > means["psnr"] or math.isinf(means["ideal_psnr"])
    assert not math.isnan(means["ideal_inside_psnr"])


def test_one_source_serves_a_batch_of_edits():
    _, _, numbers, _ = report(source=SOURCE[:1], edited=EDITED)
    assert len(numbers["each"]["psnr"]) == 2


def test_structure_and_texts_with_the_two_sides_of_a_clip():
    *_, means = report(
        source=SOURCE, edited=EDITED, prompt="a red cat", source_prompt="a cat", clip_vision=vision(),
        clip=Clip(random_projection()), clip_of_frames=True,
    )  # fmt: skip
    assert means["structure"] > 0
    assert 0 <= means["clip_text"] <= 100 and -1 <= means["clip_direction"] <= 1
    assert -1 <= means["clip_temporal"] <= 1 and means["frame_change"] > 0


def test_a_still_clip_is_perfectly_consistent():
    still = SOURCE[:1].expand(3, -1, -1, -1)
    moving = torch.cat([SOURCE, EDITED[:1]])
    *_, means = report(source=moving, edited=still, clip_vision=vision(), clip_of_frames=True)
    assert means["clip_temporal"] == pytest.approx(1.0)
    assert means["frame_change"] == 0.0


@pytest.mark.parametrize("weight", [torch.eye(16), torch.zeros(16, 16), torch.full((16, 16), torch.nan)])
def test_a_text_model_without_its_projection_is_refused(weight):
    with pytest.raises(ValueError, match="without the projection"):
        report(source=SOURCE, edited=EDITED, prompt="a cat", clip_vision=vision(), clip=Clip(weight))


def test_two_sides_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="texts have 12 numbers, the clip_vision's pictures 16"):
        report(source=SOURCE, edited=EDITED, prompt="a cat", clip_vision=vision(), clip=Clip(random_projection(12)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": torch.cat([SOURCE, SOURCE[:1]])}, "source has 3 pictures, edited has 2"),
        ({"edited": EDITED * torch.nan}, "edited is empty or holds NaN"),
        ({"edited": EDITED[:1], "clip_of_frames": True}, "a single picture"),
        ({"clip": Clip(random_projection())}, "connect clip_vision"),
        ({"mask": torch.ones(3, 8, 8)}, "the mask has 3 pictures"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        report(**{"source": SOURCE, "edited": EDITED} | changes)


def test_a_report_of_many_pictures_shows_their_mean_only():
    many = tiny_models.picture(1, 16, 16).expand(12, -1, -1, -1)
    text, plot, *_ = report(source=many, edited=many.clone().mul_(0.9))
    assert "| mean |" in text and "| 9 |" not in text
    assert plot.shape[1] == edit_report.LABEL + edit_report.MOST_ROWS * (256 + edit_report.GAP) + edit_report.CELL
