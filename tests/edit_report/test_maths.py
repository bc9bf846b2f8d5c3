"""The numbers of Edit Report against worked cases, Wang's definition of SSIM written out, and their limits."""

import math

import pytest
import torch
from palimpsest.kernels import edit_metrics as metrics

DOUBLE = torch.float64


def pictures(count=2, height=13, width=17, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error():
    a = torch.zeros(1, 4, 4, 3)
    torch.testing.assert_close(metrics.psnr(a, a + 0.1), torch.tensor([20.0], dtype=DOUBLE), rtol=1e-6, atol=0)


def test_psnr_of_equal_pictures_is_infinite():
    a = pictures()
    assert metrics.psnr(a, a).tolist() == [math.inf, math.inf]


def test_psnr_counts_only_the_weighted_pixels():
    a = torch.zeros(1, 2, 2, 3)
    b = a.clone()
    b[0, 0, 0] = 0.5
    b[0, 1, 1] = 0.1
    weight = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert float(metrics.mse(a, b, weight)) == pytest.approx(0.01 / 2)


def test_psnr_is_each_pictures_own():
    a = torch.zeros(2, 4, 4, 3)
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(metrics.psnr(a, b), torch.tensor([20.0, 40.0], dtype=DOUBLE), rtol=1e-6, atol=0)
    pooled = metrics.decibels(metrics.mse(a, b).mean())
    assert float(pooled) == pytest.approx(-10 * math.log10((0.01 + 0.0001) / 2))


def test_no_weight_at_all_is_nan():
    a = pictures()
    assert metrics.psnr(a, a, torch.zeros(2, 13, 17)).isnan().all()
    assert metrics.ssim(a, a, torch.zeros(2, 13, 17)).isnan().all()


def test_ssim_of_one_window_by_hand():
    a, b = pictures(1, 11, 11, 1), pictures(1, 11, 11, 2)
    line = torch.exp(-((torch.arange(11, dtype=DOUBLE) - 5) ** 2) / (2 * 1.5**2))
    window = line[:, None] * line / line.sum() ** 2
    scores = []
    for colour in range(3):
        x, y = a[0, :, :, colour].double(), b[0, :, :, colour].double()
        mu_x, mu_y = (window * x).sum(), (window * y).sum()
        var_x, var_y = (window * (x - mu_x) ** 2).sum(), (window * (y - mu_y) ** 2).sum()
        cov = (window * (x - mu_x) * (y - mu_y)).sum()
        lightness = (2 * mu_x * mu_y + 1e-4) / (mu_x**2 + mu_y**2 + 1e-4)
        scores.append(lightness * (2 * cov + 9e-4) / (var_x + var_y + 9e-4))
    torch.testing.assert_close(metrics.ssim(a, b), torch.stack(scores).mean()[None])


def test_ssim_of_equal_pictures_is_one_and_symmetric():
    a, b = pictures(seed=3), pictures(seed=4)
    torch.testing.assert_close(metrics.ssim(a, a), torch.ones(2, dtype=DOUBLE))
    torch.testing.assert_close(metrics.ssim(a, b), metrics.ssim(b, a))


def test_ssim_counts_the_windows_around_the_weighted_pixels():
    a, b = pictures(1, 13, 17, 5), pictures(1, 13, 17, 6)
    score = metrics.ssim_map(a, b)
    assert score.shape == (1, 3, 7)
    weight = torch.zeros(1, 13, 17)
    weight[0, 5 + 2, 5 + 4] = 1  # the middle of the window in row 2, column 4
    weight[0, 0, 0] = 1  # no window lies around a corner
    torch.testing.assert_close(metrics.ssim(a, b, weight), score[:, 2, 4])


def test_black_pictures_are_equal():
    black = torch.zeros(1, 11, 11, 3)
    assert metrics.ssim(black, black).tolist() == [1.0]


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="11 x 11 pixels, got 17 x 9"):
        metrics.ssim(pictures(1, 9), pictures(1, 9))


def test_structure_distance_by_hand():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # orthogonal places
    b = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])  # parallel places
    assert float(metrics.structure_distance(a, b)) == pytest.approx(2 / 4)


def test_structure_distance_is_blind_to_a_rotation_of_the_features():
    features = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE))
    assert float(metrics.structure_distance(features, features @ turn)) < 1e-20


def test_text_score_is_a_percentage_and_never_negative():
    text = torch.tensor([[1.0, 0.0]])
    found = metrics.text_score(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [1.0, 1.0]]), text)
    torch.testing.assert_close(found, torch.tensor([100.0, 0.0, 100 / math.sqrt(2)], dtype=DOUBLE))


def test_direction_score_compares_changes():
    source, edited = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    before, after = torch.tensor([[0.0, 5.0]]), torch.tensor([[3.0, 5.0]])
    assert float(metrics.direction_score(source, edited, before, after)) == pytest.approx(1.0)
    assert float(metrics.direction_score(source, edited, after, before)) == pytest.approx(-1.0)


def test_frame_consistency_is_the_mean_over_all_pairs():
    frames = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    pairs = [0.0, 1 / math.sqrt(2), 1 / math.sqrt(2)]
    assert float(metrics.frame_consistency(frames)) == pytest.approx(sum(pairs) / 3)
    assert math.isnan(float(metrics.frame_consistency(frames[:1])))


def test_frame_change_is_the_mean_step():
    frames = torch.tensor([0.0, 0.5, 0.4]).view(3, 1, 1, 1).expand(3, 2, 2, 3)
    assert float(metrics.frame_change(frames)) == pytest.approx(0.3)
