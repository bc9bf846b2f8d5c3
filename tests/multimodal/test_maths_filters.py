"""What pictures are left out by, and how alike a prompt's objects and those of a picture are."""

import pytest
import torch
import torch.nn.functional as F
from palimpsest.kernels.edit_metrics import multimodal_score
from palimpsest.kernels.picture_filters import aspect, difference_hash, differing_bits


def noise(height=72, width=80, seed=0):
    rough = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(rough, size=(height, width), mode="bicubic").clamp(0, 1)[0].movedim(0, -1)


def test_the_longer_side_over_the_shorter():
    assert aspect(100, 50) == aspect(50, 100) == 2.0
    assert aspect(7, 7) == 1.0


def test_a_hash_says_where_a_picture_gets_brighter_to_the_right():
    rising = torch.linspace(0, 1, 90).repeat(40, 1)[..., None].expand(-1, -1, 3)
    assert difference_hash(rising).all()
    assert not difference_hash(rising.flip(1)).any()
    assert not difference_hash(torch.full((33, 47, 3), 0.3)).any()
    half = torch.cat([rising[:20], rising[:20].flip(1)])
    assert difference_hash(half).reshape(8, 8)[:4].all() and not difference_hash(half).reshape(8, 8)[4:].any()


def test_the_same_picture_keeps_its_hash_and_another_does_not():
    picture = noise()
    bits = difference_hash(picture)
    small = F.interpolate(picture.movedim(-1, 0)[None], size=(41, 47), mode="bilinear", antialias=True)[0]
    alike = torch.stack([difference_hash(p) for p in (small.movedim(0, -1), picture * 0.7, picture.half())])
    assert differing_bits(bits, alike).max() <= 3
    others = torch.stack([difference_hash(noise(seed=seed)) for seed in range(1, 30)])
    assert differing_bits(bits, others).min() >= 12
    assert differing_bits(bits, torch.stack([bits, ~bits])).tolist() == [0, 64]


def test_objects_are_compared_one_by_one_and_one_that_is_missing_counts_nothing():
    given = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    drawn = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert multimodal_score(given, drawn).item() == pytest.approx(100 * (1 + 0.5**0.5) / 3)
    assert multimodal_score(given, given).item() == pytest.approx(100)
    assert multimodal_score(given[:1], -given[:1]) == 0
    assert multimodal_score(given.half(), drawn.half()).item() == pytest.approx(56.9035, abs=1e-2)
    with pytest.raises(ValueError, match=r"need \(n, C\) twice, got \(3, 2\) and \(2, 2\)"):
        multimodal_score(given, drawn[:2])
