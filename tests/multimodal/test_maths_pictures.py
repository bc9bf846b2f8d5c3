"""Which crops are kept, and what is done to them, on small pictures by hand."""

import pytest
import torch
from palimpsest.kernels import conditioning_pictures as maths


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((0, 0, 150, 150), True),
        ((0, 0, 149, 151), False),  # 22499 pixels
        ((0, 0, 300, 75), True),  # the area counts, not the shape
        ((0, 0, 900, 1000), False),  # 90 %
        ((0, 0, 750, 1000), True),
        ((10, 10, 10, 500), False),
    ],
)
def test_crops_are_filtered_as_in_the_paper(box, kept):
    assert maths.worth_showing(box, 1000, 1000, 150, 0.75) is kept


def test_a_box_without_pixels_is_never_worth_showing():
    assert not maths.worth_showing((5, 5, 5, 9), 10, 10, 0, 1.0)


def test_how_much_of_a_box_lies_in_another():
    assert maths.inside((2, 2, 6, 6), (0, 0, 4, 10)) == 0.5
    assert maths.inside((2, 2, 6, 6), (0, 0, 8, 8)) == 1.0
    assert maths.inside((2, 2, 6, 6), (7, 7, 8, 8)) == 0.0


def test_the_box_around_a_mask_and_what_is_in_it():
    mask = torch.zeros(6, 9)
    mask[2:4, 3:8] = 0.6
    assert maths.box_around(mask) == (3, 2, 8, 4)
    assert maths.box_around(torch.zeros(3, 3)) is None
    picture = torch.rand(6, 9, 3)
    assert torch.equal(maths.crop(picture, (3, 2, 8, 4)), picture[2:4, 3:8])


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (40, 31)])
def test_every_variation_gives_a_picture_and_leaves_its_input_alone(size):
    picture = torch.rand(*size, 3, generator=torch.Generator().manual_seed(0))
    kept = picture.clone()
    for variation in maths.VARIATIONS:
        found = variation(picture, torch.Generator().manual_seed(1))
        assert found.shape[-1] == 3
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
        assert torch.equal(picture, kept)
        assert torch.equal(found, variation(picture, torch.Generator().manual_seed(1)))


def test_a_random_crop_keeps_most_of_each_side():
    picture = torch.rand(100, 50, 3)
    for seed in range(10):
        found = maths.random_crop(picture, torch.Generator().manual_seed(seed))
        assert 70 <= found.shape[0] <= 100
        assert 35 <= found.shape[1] <= 50


def test_grey_is_grey_and_a_flip_undoes_itself():
    picture = torch.rand(4, 5, 3)
    grey = maths.greyscale(picture)
    assert torch.equal(grey[..., 0], grey[..., 2])
    assert float(maths.greyscale(torch.ones(2, 2, 3)).mean()) == pytest.approx(1.0)
    generator = torch.Generator()
    flipped = maths.flip(picture, generator)
    assert torch.equal(flipped[:, 0], picture[:, -1])
    assert torch.equal(maths.flip(flipped, generator), picture)


def test_a_random_crop_is_a_part_of_the_picture_anywhere_in_it():
    """On a picture that tells the place of every pixel."""
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(90.0), indexing="ij")
    picture, corners = torch.stack([rows, columns, rows], -1), []
    for seed in range(40):
        found = maths.random_crop(picture, torch.Generator().manual_seed(seed))
        top, left = (int(value) for value in found[0, 0, :2])
        assert torch.equal(found, picture[top : top + len(found), left : left + found.shape[1]])
        corners.append((top, left))
    assert max(top for top, _ in corners) <= 12 < max(left for _, left in corners) <= 27
    assert min(min(corner) for corner in corners) == 0


def test_noise_has_its_strength_and_grey_the_luma_of_its_colour():
    even = torch.full((100, 100, 3), 0.5)
    noise = maths.gaussian_noise(even, torch.Generator().manual_seed(0)) - even
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0.0, abs=2e-3)
    for colour, luma in enumerate((0.299, 0.587, 0.114)):
        assert float(maths.greyscale(torch.eye(3)[colour].expand(1, 1, 3))[0, 0, 0]) == pytest.approx(luma)


def test_every_variation_comes_up():
    picture = torch.rand(20, 20, 3)
    found = [maths.varied(picture, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert sum(torch.equal(each, picture.flip(1)) for each in found) in range(3, 20)
    assert sum(each.shape != picture.shape for each in found) in range(3, 20)


@pytest.mark.parametrize("size", [(2, 2), (17, 40)])
def test_a_sketch_shows_dark_lines_on_light_ground_and_nothing_on_even_ground(size):
    even = torch.full((*size, 3), 0.6)
    assert float(maths.sketch(even).max()) < 1e-2 or float(maths.blurred(even[..., 0], 3.0).std()) < 1e-6
    lines = torch.ones(30, 40, 3)
    lines[14:16] = 0.1
    found = maths.sketch(lines)
    assert float(found[15].mean()) > 0.9
    assert float(found[2].mean()) < 0.05
    assert torch.equal(found[..., 0], found[..., 1])


def test_a_blur_keeps_the_mean_and_is_the_gaussian():
    spot = torch.zeros(31, 31, dtype=torch.float64)
    spot[15, 15] = 1
    found = maths.blurred(spot, 2.0)
    assert float(found.sum()) == pytest.approx(1.0)
    assert float(found[15, 17] / found[15, 15]) == pytest.approx(torch.exp(torch.tensor(-0.5)).item(), rel=1e-4)
    torch.testing.assert_close(found, found.mT)


def test_a_blur_of_a_picture_that_is_not_square_is_the_same_along_both_sides():
    generator = torch.Generator().manual_seed(0)
    grey = torch.rand(9, 40, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(maths.blurred(grey.mT, 3.0), maths.blurred(grey, 3.0).mT)
    ramp = torch.linspace(0, 1, 40, dtype=torch.float64).expand(31, 40)
    torch.testing.assert_close(maths.blurred(ramp, 2.0)[:, 8:-8], ramp[:, 8:-8])


def test_a_share_of_a_picture_is_of_its_own_area():
    assert maths.worth_showing((0, 0, 50, 15), 10 * 2, 50, 1, 0.75)
    assert not maths.worth_showing((0, 0, 50, 16), 10 * 2, 50, 1, 0.75)
