"""What the host's own VAE cuts off a picture, and that masks and edits are found where it left them."""

import pytest
import torch
from palimpsest.nodes import host

SIZES = [(128, 128), (125, 131), (128, 135), (79, 64)]


def pictures(height, width, seed=0):
    coarse = torch.rand(1, 3, height // 3, width // 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1).movedim(1, -1)


@pytest.mark.parametrize("size", SIZES)
def test_a_mask_is_cut_as_the_host_cuts_the_picture(inference, pocket_vae, size):
    picture = pictures(*size)
    cut = pocket_vae.vae_encode_crop_pixels(picture)
    latent = tuple(side // 8 for side in cut.shape[1:3])
    assert torch.equal(host.as_encoded(picture[..., 0], latent), cut[..., 0])
    assert pocket_vae.encode(picture).shape[-2:] == latent


def test_a_mask_is_cut_by_larger_cells_too(inference, pocket_vae, monkeypatch):
    """As the host cuts for a VAE of 16 pixels a cell (FLUX.2, Wan 2.2 5B)."""
    monkeypatch.setattr(type(pocket_vae), "spacial_compression_encode", lambda _: 16)
    for size in [(256, 256), (250, 261), (128, 160)]:
        cut = pocket_vae.vae_encode_crop_pixels(pictures(*size))
        latent = tuple(side // 16 for side in cut.shape[1:3])
        assert torch.equal(host.as_encoded(pictures(*size)[..., 0], latent), cut[..., 0])


def test_a_mask_of_another_size_is_the_whole_pictures():
    for size in [(50, 50), (64, 64), (256, 250)]:
        mask = torch.rand(1, *size)
        assert host.as_encoded(mask, (8, 8)) is mask or size == (64, 64)
    assert host.as_encoded(torch.rand(1, 64, 64), (8, 8)).shape == (1, 64, 64)


@pytest.mark.parametrize("size", SIZES[1:])
def test_an_edit_that_the_host_cut_is_told_from_one_that_was_resized(pocket_vae, size):
    picture = pictures(*size)
    cut = pocket_vae.vae_encode_crop_pixels(picture)
    small = torch.nn.functional.interpolate(picture.movedim(-1, 1), size=cut.shape[1:3], mode="bicubic", antialias=True)
    tinted = [each * 0.7 + 0.1 for each in (cut[0], small[0].movedim(0, -1))]
    assert host.was_cut(picture[0], tinted[0])
    assert not host.was_cut(picture[0], tinted[1])
    assert not host.was_cut(picture[0], picture[0])
    assert not host.was_cut(picture[0], cut[0, 1:])


@pytest.mark.parametrize("size", SIZES)
def test_beyond_the_middle_its_border_is_repeated(size):
    whole = pictures(*size)[0].movedim(-1, 0)
    rows, columns = host.middle(size, tuple(side // 8 * 8 for side in size))
    found = host.beyond(whole[:, rows, columns], size)
    assert found.shape == whole.shape
    assert torch.equal(found[:, rows, columns], whole[:, rows, columns])
    assert torch.equal(found[:, 0, 0], whole[:, rows.start, columns.start])
    assert torch.equal(found[:, -1, -1], whole[:, rows.stop - 1, columns.stop - 1])
