"""The numbers: their closed forms, and that `identity` tells an animal from a stranger."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pocket import judge as judging
from pocket import metrics, train_judge, validate_metrics, world

SCENES = world.held_out_scenes(32)


@pytest.fixture(scope="module")
def judge():
    return judging.load()


@pytest.fixture(scope="module")
def pictures():
    return np.stack([world.render(scene) for scene in SCENES])


# -------------------------------------------------------------------------------------------------- pixel by pixel


def test_psnr_by_hand():
    a = torch.zeros(2, 4, 4, 3)
    b = a.clone()
    b[1, :2] = 0.1
    assert metrics.psnr(a, b).tolist() == [math.inf, pytest.approx(-10 * math.log10(0.005))]
    top = torch.zeros(4, 4)
    top[:2] = 1
    assert metrics.psnr(a, b, top)[1].item() == pytest.approx(20, abs=1e-4)
    assert metrics.psnr(a, b, 1 - top)[1].item() == math.inf


def test_psnr_takes_bytes_and_single_images(pictures):
    assert metrics.psnr(pictures[0], pictures[0].astype(np.float32) / 255).item() > 100


def test_ssim_is_one_for_equal_images_and_falls_with_noise(pictures):
    clean = metrics.to_float(pictures[:2])
    torch.manual_seed(0)
    noisy = [(clean + std * torch.randn_like(clean)).clamp(0, 1) for std in (0.02, 0.1)]
    assert metrics.ssim(clean, clean) == pytest.approx(1, abs=1e-5)
    weak, strong = (metrics.ssim(clean, image).mean().item() for image in noisy)
    assert 1 > weak > strong > 0


def test_ssim_of_two_flat_images_by_hand():
    """No variance: only the term of the means is left, (2 m n + C1) / (m^2 + n^2 + C1)."""
    a, b = torch.full((1, 16, 16, 3), 0.5), torch.full((1, 16, 16, 3), 0.25)
    expected = (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
    assert metrics.ssim(a, b).item() == pytest.approx(expected, abs=1e-4)


def test_images_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="need images"):
        metrics.psnr(torch.zeros(3, 4), torch.zeros(3, 4))


def test_lab_of_known_colours():
    colours = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0]])
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]])
    assert torch.allclose(metrics.lab(colours), expected, atol=0.05)


# ---------------------------------------------------------------------------------------------------------- palette


def test_palette_forgives_displacement_and_sees_colour():
    image = torch.zeros(1, 32, 32, 3)
    image[:, 4:12, 4:12] = torch.tensor([0.8, 0.2, 0.2])
    image[:, 4:12, 4:8] = torch.tensor([0.9, 0.9, 0.8])
    mask = torch.zeros(1, 32, 32)
    mask[:, 4:12, 4:12] = 1
    moved, moved_mask = image.roll((9, 5), (1, 2)), mask.roll((9, 5), (1, 2))
    assert metrics.palette_distance(moved, image, moved_mask, mask).item() == pytest.approx(0, abs=1e-4)
    assert metrics.palette_distance(image.flip(3), image, mask, mask).item() > 10
    assert metrics.palette_distance(image, image, torch.zeros(1, 32, 32), mask).item() == 100


def test_palette_of_two_flat_colours_is_their_mean_projected_distance():
    grey, light = torch.full((1, 8, 8, 3), 0.4), torch.full((1, 8, 8, 3), 0.6)
    lightness = (metrics.lab(light) - metrics.lab(grey))[0, 0, 0, 0].item()
    share = (1 + 4 / math.sqrt(2)) / 9  # of 9 directions one is lightness, four lie at 45 degrees to it
    ones = torch.ones(1, 8, 8)
    assert metrics.palette_distance(grey, light, ones, ones).item() == pytest.approx(lightness * share, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- the judge


def test_judge_reads_held_out_pictures(judge, pictures):
    success = metrics.attribute_success(judge, pictures, SCENES)
    assert set(success) == {*world.CAPTIONED, "all"}
    assert min(success[name] for name in world.CAPTIONED) >= 0.95, success


def test_judge_finds_the_animal(judge, pictures):
    masks = np.stack([world.render(scene, with_mask=True)[1] for scene in SCENES])
    assert train_judge.overlap(judge, pictures, masks) > 0.9


def test_judge_is_small():
    assert judging.WEIGHTS.stat().st_size <= 4e6


def test_attributes_come_as_values_of_the_world(judge, pictures):
    found = metrics.attributes(judge, pictures[:3])
    assert found.keys() == world.ATTRIBUTES.keys()
    assert all(value in world.ATTRIBUTES[name] for name, values in found.items() for value in values)


def test_undefined_attributes_count_nothing():
    bird = world.edit(SCENES[0], species="bird", pattern="plain", socks=True, tailtip=False)
    assert not judging.shows(bird, "socks")
    assert not judging.shows(bird, "second")
    assert judging.labels([bird])["second"].item() == judging.UNDEFINED
    logits = {name: torch.zeros(1, len(values)) for name, values in world.ATTRIBUTES.items()}
    assert metrics.right_answers(logits, [bird], ["socks"])["socks"].isnan().all()


def test_other_sizes_are_judged(judge):
    scenes = SCENES[:4]
    large = np.stack([world.render(scene, 256) for scene in scenes])
    assert metrics.attribute_success(judge, large, scenes, ["species", "pose"])["all"] == 1


def test_mirror_swaps_side_and_facing():
    pictures, areas = torch.rand(1, 3, 4, 4), torch.rand(1, 6, 2, 2)
    classes = {"side": torch.tensor([0]), "facing": torch.tensor([1]), "pose": torch.tensor([3])}
    flipped, _, swapped = train_judge.mirror(pictures, areas, classes)
    assert torch.equal(flipped[..., 0], pictures[..., -1])
    assert {name: value.item() for name, value in swapped.items()} == {"side": 1, "facing": 0, "pose": 3}


# ---------------------------------------------------------------------------------------------------------- identity


def test_identity_tells_the_animal_from_a_stranger_wherever_it_stands(judge):
    ideals, pictures = validate_metrics.draw(20)
    scores = {name: metrics.identity(judge, images, ideals)["score"] for name, images in pictures.items()}
    right = torch.cat([scores[name] for name in validate_metrics.RIGHT])
    assert scores["displaced"].mean() == pytest.approx(scores["ideal"].mean().item(), abs=0.05)
    assert validate_metrics.auc(right, scores["stranger"]) > 0.97
    for wrong in ("other coat", "plain coat", "other collar", "looks the other way"):
        assert scores[wrong].mean() < right.mean() - 0.05, wrong


def test_auc_by_hand():
    assert validate_metrics.auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])) == pytest.approx(0.875)
