"""Read Attention Map in the host: heat maps, masks and figures of a record."""

import pytest
import tiny_models
import torch
from attention_map.recorded import made, read
from palimpsest.nodes.attention_map import nodes as attention_map
from palimpsest.nodes.attention_map.nodes import ReadAttentionMap
from palimpsest.nodes.attention_map.reading import NORMALISE, ReadSettings

pytestmark = pytest.mark.usefixtures("inference")


def test_heat_maps_masks_and_figures_have_the_pictures_size():
    picture = tiny_models.picture(2, 96, 80)
    heat, mask, soft, leakage, report = read(made(), image=picture)
    assert heat.shape == (4, 96, 80, 3)
    assert mask.shape == soft.shape == (2, 96, 80)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert 0 <= soft.min() <= soft.max() <= 1
    assert leakage == -1
    assert report.startswith("red cat: ")
    assert "snow: " in report
    heat, mask, *_ = read(made())
    assert heat.shape == (4, 64, 64, 3)


def test_a_mask_is_where_any_chosen_word_acts():
    _, left, *_ = read(made(), words="red cat")
    _, corner, *_ = read(made(), words="SNOW")
    _, both, *_ = read(made())
    expected = torch.zeros(64, 64)
    expected[:, :32] = 1
    assert (left[0] - expected).abs().mean() < 0.04
    assert torch.equal(both, torch.maximum(left, corner))


def test_leakage_is_measured_against_the_users_mask():
    half = torch.zeros(1, 32, 32)
    half[:, :, :16] = 1
    *_, leakage, report = read(made(), words="red cat", mask=half)
    assert leakage == pytest.approx(0.01 / 0.21, abs=0.02)
    assert "of it outside the mask" in report
    assert "looks everywhere alike: 0.500" in report
    found = read(made(), words="red cat")[1][0]
    white = torch.nn.functional.interpolate(half[None], size=found.shape, mode="nearest")[0, 0]
    shared = float((found * white).sum() / torch.maximum(found, white).sum())
    assert f"the map's mask and yours share {shared:.0%} (intersection over union)" in report
    *_, other, _ = read(made(), words="snow", mask=half)
    assert other > 0.8


def test_a_higher_threshold_gives_a_smaller_mask():
    areas = [read(made(), words="red cat", threshold=value)[1].mean().item() for value in (0.05, 0.5, 0.95)]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[2]


@pytest.mark.parametrize("normalise", NORMALISE)
def test_every_normalisation_gives_values_from_0_to_1(normalise):
    _, _, soft, *_ = read(made(), normalise=normalise)
    assert 0 <= soft.min() <= soft.max() <= 1


def test_labels_are_written_and_can_be_left_off():
    plain, labelled = (read(made(), label=label)[0] for label in (False, True))
    changed = (plain - labelled).abs().amax(-1) > 0.01
    assert changed[:, :24].any()
    assert not changed[:, 32:].any()
    picture = tiny_models.picture(1, 64, 64)
    grey = read(made(1), image=picture, opacity=0.0, label=False)[0]
    assert torch.allclose(grey[..., 0], grey[..., 1])


def test_what_is_not_recorded_is_refused_by_name():
    with pytest.raises(ValueError, match="'dog' was not recorded; the words of this record are red cat, snow"):
        read(made(), words="dog")
    with pytest.raises(ValueError, match=r"levels is '1/4 of the latent', and this record has 1/1 of the latent"):
        read(made(), levels="1/4 of the latent")
    with pytest.raises(ValueError, match="the image has 3 pictures, the record has 2"):
        read(made(), image=tiny_models.picture(3))
    with pytest.raises(ValueError, match="only 'cat' was recorded"):
        read(made(words=("cat",)), normalise="words against each other")
    with pytest.raises(ValueError, match="mask"):
        read(made(), mask=torch.zeros(3, 8, 8))


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.75, 0.25), (1.0, 1.0)])
def test_percents_that_leave_no_step_are_refused(start, end):
    with pytest.raises(ValueError, match=rf"start_percent {start:g} and end_percent {end:g} leave no step"):
        read(made(), start_percent=start, end_percent=end)


def test_every_input_arrives_in_its_field(monkeypatch):
    chosen = {
        "words": "snow", "levels": "1/1 of the latent", "start_percent": 0.2, "end_percent": 0.7,
        "normalise": "as measured", "threshold": 0.3, "clean": 5, "opacity": 0.4, "label": False,
    }  # fmt: skip
    sockets = ("record", "samples", "image", "mask")
    assert {entry.id for entry in ReadAttentionMap.define_schema().inputs} == {*chosen, *sockets}
    seen, read_record, draw = [], attention_map.read, attention_map.drawn
    monkeypatch.setattr(attention_map, "read", lambda *given: seen.append(given) or read_record(*given))
    monkeypatch.setattr(attention_map, "drawn", lambda *given: seen.append(given) or draw(*given))
    record, image, mask = made(1), tiny_models.picture(1, 40, 48), torch.rand(1, 8, 8)
    latent = {"samples": record.runs[0].samples}
    ReadAttentionMap.execute(record, samples=latent, image=image, mask=mask, **chosen)
    (known, settings, samples, size, wanted), (reading, picture, opacity, label) = seen
    assert (known, samples, size, wanted) == (record, latent["samples"], (40, 48), mask)
    assert settings == ReadSettings(
        words="snow", levels="1/1 of the latent", start_percent=0.2, end_percent=0.7, normalise="as measured",
        threshold=0.3, clean=5, opacity=0.4, label=False,
    )  # fmt: skip
    assert (reading.words, picture, opacity, label) == (("snow",), image, 0.4, False)
    assert set(reading.thresholds.flatten().tolist()) == {torch.tensor(0.3).item()}


def test_steps_are_read_within_their_span():
    record = made(1)
    record.runs[0].levels[8, 8][3] *= 2
    shares = {
        span: read(record, normalise="as measured", words="snow", start_percent=span[0], end_percent=span[1])[2].max()
        for span in ((0.0, 1.0), (0.25, 0.75), (0.75, 1.0))
    }
    assert shares[0.75, 1.0] == pytest.approx(2 * shares[0.25, 0.75].item())
    assert shares[0.0, 1.0] == pytest.approx(4 / 3 * shares[0.25, 0.75].item())
