"""kernels/text_control.py against its equations by hand."""

import pytest
import torch
from palimpsest.kernels.text_control import (
    HINT_CHANNELS,
    AuxiliaryLatent,
    blanked,
    fitted,
    packed,
    reading_loss,
    unpacked,
)


def maps(height=3, width=5, batch=1, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return (
        torch.rand(1, 1, 16 * height, 16 * width, generator=drawn).round(),
        torch.rand(1, 1, 8 * height, 8 * width, generator=drawn).round(),
        torch.randn(batch, 4, height, width, generator=drawn),
    )


def test_packing_keeps_every_pixel_in_its_cell():
    glyphs, positions, masked = maps(batch=2)
    hint = packed(glyphs, positions, masked)
    assert hint.shape == (2, HINT_CHANNELS, 3, 5)
    assert torch.equal(hint[0, :256, 1, 2].view(16, 16), glyphs[0, 0, 16:32, 32:48])
    assert torch.equal(hint[1, 256:320, 2, 4].view(8, 8), positions[0, 0, 16:24, 32:40])
    back = unpacked(hint)
    assert torch.equal(back[0][1], glyphs[0]) and torch.equal(back[1][0], positions[0])
    assert torch.equal(back[2], masked)


def test_maps_that_do_not_meet_are_named():
    _, positions, masked = maps()
    with pytest.raises(ValueError, match="glyphs of 40 x 24 do not meet a latent of 5 x 3: 80 x 48"):
        packed(positions, positions, masked)


def test_fitting_to_the_own_size_is_the_identity_and_else_keeps_what_it_should():
    given = maps()
    assert all(a is b for a, b in zip(fitted(*given, (3, 5)), given, strict=True))
    glyphs, positions, masked = fitted(*given, (6, 10))
    assert packed(glyphs, positions, masked).shape == (1, HINT_CHANNELS, 6, 10)
    assert set(positions.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(glyphs.mean(), given[0].mean())


def test_blanking_is_grey_where_text_is_and_the_authors_in_their_scale():
    picture, where = torch.rand(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    where[..., :2] = 1
    found = blanked(picture, where)
    assert torch.equal(found[..., 2:], picture[..., 2:])
    torch.testing.assert_close(2 * found - 1, (2 * picture - 1) * (1 - where))


def test_the_module_is_the_published_one():
    """1.3 million numbers; 9 and 7 convolutions and the one that fuses, at the places of a Sequential with SiLU."""
    module = AuxiliaryLatent(320)
    names = {name.rsplit(".", 1)[0] for name in module.state_dict()}
    assert names == {f"glyph_block.{2 * i}" for i in range(9)} | {f"position_block.{2 * i}" for i in range(7)} | {
        "fuse_block"
    }
    assert module.glyph_block[16].weight.shape == (256, 96, 3, 3)
    assert module.fuse_block.weight.shape == (320, 324, 3, 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_it_is_the_sum_of_its_blocks_by_hand(dtype, tolerance):
    torch.manual_seed(0)
    module = AuxiliaryLatent(6).double()
    given = maps(3, 5)
    hint = packed(*given)
    wanted = torch.nn.functional.conv2d(
        torch.cat(
            [module.glyph_block(given[0].double()), module.position_block(given[1].double()), given[2].double()], 1
        ),
        module.fuse_block.weight,
        module.fuse_block.bias,
        padding=1,
    )
    found = module.to(dtype)(hint.to(dtype), "emb", "context")
    assert found.shape == (1, 6, 3, 5)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_what_reads_alike_costs_nothing_and_noise_makes_it_cheap():
    drawn, wanted = torch.ones(3, 2, 2), torch.zeros(3, 2, 2)
    level = torch.tensor([0.0, 1.0, 3.0])
    torch.testing.assert_close(reading_loss(drawn, wanted, level), torch.tensor([1.0, 0.5, 0.1]))
    assert not reading_loss(drawn, drawn, level).any()
