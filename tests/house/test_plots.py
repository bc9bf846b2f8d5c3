"""The one place that draws: where values land, what a line's mean is, sheets of pictures."""

import math

import pytest
import torch
from palimpsest.nodes import plots


def colours(picture):
    """The colours of a picture (H, W, 3) in 0..1, as 8 bits."""
    return {tuple(colour) for colour in (picture.flatten(0, -2) * 255).round().int().tolist()}


def test_a_picture_of_8_bits_comes_back_as_it_was():
    picture = torch.arange(256).view(16, 16, 1).expand(-1, -1, 3) / 255
    assert torch.equal(plots.to_tensor(plots.to_image(picture)), picture)


def test_axes_run_from_the_lower_left_corner_and_hold_what_lies_beyond():
    axes = plots.Axes((10, 20, 110, 70), last=4, low=1.0, high=3.0)
    assert axes.at(0, 1.0) == (10, 70)
    assert axes.at(4, 3.0) == (110, 20)
    assert axes.at(1, 2.0) == (35, 45)
    assert axes.at(4, 9.0) == (110, 20)
    assert axes.at(4, -9.0) == (110, 70)


def test_axes_of_one_value_are_no_division_by_zero():
    assert plots.Axes((0, 0, 10, 10), 1, 2.0, 2.0).at(1, 2.0) == (10, 10)


def test_the_running_mean_is_over_a_tenth_of_the_points():
    points = [(float(i), float(i % 2)) for i in range(20)]
    assert plots.smoothed(points)[1:] == [(float(i), 0.5) for i in range(1, 20)]
    assert plots.smoothed(points[:2]) == points[:2]


def test_a_constant_stays_what_it_is():
    assert plots.smoothed([(i, 3.0) for i in range(31)]) == [(i, pytest.approx(3.0)) for i in range(31)]


@pytest.mark.parametrize("grows", [True, False])
def test_noise_levels_are_told_apart_by_thirds(grows):
    share = {"little noise": 0.1, "middle": 0.5, "much noise": 0.9}
    points = [(i, s if grows else 1 - s, 7.0 + i) for i, s in enumerate(share.values())]
    lines = plots.by_noise(points, grows)
    assert {line.name: line.points for line in lines} == {name: [(i, 7.0 + i)] for i, name in enumerate(share)}


def test_a_panel_leaves_out_the_highest_hundredth_but_not_of_ratios():
    values = [(i, 1.0) for i in range(999)] + [(999, 50.0), (1000, math.nan)]
    assert plots.Panel("", [plots.Line("", plots.RED, values)]).span() == (0.0, pytest.approx(1.05))
    assert plots.Panel("", [plots.Line("", plots.RED, values)], around_one=True).span() == pytest.approx((0.98, 50.02))


@pytest.mark.parametrize("steps", [0, 1, 2, 50])
def test_a_training_of_any_length_can_be_drawn(steps):
    losses = [(i + 1, 0.5 + 0.1 * (i % 3)) for i in range(steps)]
    ratios = [plots.Line("sampled", plots.BLUE, losses)]
    drawn = plots.training([plots.Panel("loss", plots.with_mean(losses)), plots.Panel("error", ratios, True)], steps)
    assert drawn.shape == (1, 2 * plots.PANEL_HEIGHT, plots.PANEL_WIDTH, 3)
    upper, lower = drawn[0].chunk(2)
    assert (plots.RED in colours(upper)) == (steps > 2)  # two have no other mean than themselves
    assert plots.BLUE in colours(lower)  # the name in the legend at least


def test_a_label_stays_in_its_corner_and_a_frame_on_its_edge():
    grey = torch.full((100, 120, 3), 0.5)
    changed = (plots.labelled(grey, "cat") - grey).abs().amax(-1) > 0.1
    assert changed[:20, :40].any()
    assert not changed[30:].any()
    framed = (plots.boxed(grey, [(20, 30, 60, 70)]) - grey).abs().amax(-1) > 0.1
    assert framed.sum() == 2 * 41 + 2 * 39
    assert framed[30, 20:61].all()


def test_a_sheet_has_its_rows_below_one_another():
    rows = (plots.Row([(torch.full((30, 60, 3), i / 4), f"picture {i}")] * 9, "text " * 40) for i in range(3))
    drawn = plots.sheet(rows, side=48, columns=4)
    assert drawn.shape[2] == 4 * (48 + plots.GAP) + plots.GAP
    assert drawn.shape[1] % 3 == 0
    for i, row in enumerate(drawn[0].chunk(3)):
        cell = row[plots.GAP : plots.GAP + 24, plots.GAP : plots.GAP + 48]
        assert cell.unique().tolist() == pytest.approx([round(255 * i / 4) / 255])
    assert plots.sheet([]).shape == (1, plots.TEXT_LINE, 6 * 150 + 6, 3)
