"""Keep Outside in the host: what stays, what comes back, what is found, what is refused."""

import inspect

import comfy.model_management
import pytest
import torch
from palimpsest.kernels.alignment import shifted_back
from palimpsest.nodes.keep_outside import compositing
from palimpsest.nodes.keep_outside.nodes import KeepOutside
from pocket import world

PLAIN = {
    "grow": 0, "feather": 0, "colour_match": "none", "align": "none", "fit": "automatic", "invert_mask": False,
}  # fmt: skip


def keep(source, edited, mask, **changes):
    """Run the node with everything off except `changes`."""
    return KeepOutside.execute(source, edited, mask, **PLAIN | changes).args


def defaults():
    schema = KeepOutside.define_schema()
    return {item.id: item.default for item in schema.inputs if getattr(item, "default", None) is not None}


def pictures(count=1, height=48, width=64, channels=3, seed=0):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def box(height=48, width=64, count=1):
    mask = torch.zeros(count, height, width)
    mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    return mask


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def scene():
    """A drawn picture (1, 128, 128, 3), its edit in another colour, and the animal's mask."""
    source = world.held_out_scenes(3)[2]
    picture, mask = world.render(source, with_mask=True)
    other = "blue" if source.colour != "blue" else "red"
    edited = world.render(world.edit(source, colour=other))
    as_tensor = [torch.from_numpy(p).float()[None] / 255 for p in (picture, edited)]
    return *as_tensor, torch.from_numpy(mask).float()[None]


# ------------------------------------------------------------------------------------------------------ what stays


@pytest.mark.parametrize("settings", [{}, {"grow": 3}, {"grow": -2}, {"feather": 5}, {"grow": 4, "feather": 6}])
@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
def test_outside_no_bit_moves_and_inside_the_edit_arrives(settings, size):
    source, edited, mask = pictures(1, *size), pictures(1, *size, seed=1), box(*size)
    image, weights, _, difference = keep(source, edited, mask, **settings)
    outside = weights == 0
    assert torch.equal(bits(image[outside]), bits(source[outside]))
    assert torch.equal(image[weights == 1], edited[weights == 1])
    assert difference == 0.0
    assert 0 < float((weights > 0).float().mean()) < 1


def test_without_grow_and_feather_the_weights_are_the_mask():
    mask = torch.rand(1, 48, 64)
    mask[mask < 0.3] = 0
    _, weights, *_ = keep(pictures(), pictures(seed=1), mask)
    assert torch.equal(weights, mask)


def test_the_feather_stays_within_the_mask():
    _, weights, *_ = keep(pictures(), pictures(seed=1), box(), feather=4)
    assert bool((weights[box() == 0] == 0).all())
    assert float(weights.max()) == 1
    assert len(weights.unique()) > 4


@pytest.mark.parametrize("width", [1, 4, 9])
def test_the_feather_is_as_wide_as_it_says(width):
    mask = torch.zeros(1, 48, 64)
    mask[:, :, 20:] = 1  # a straight edge; the first white pixel lies 1 pixel from the outside
    _, weights, *_ = keep(pictures(), pictures(seed=1), mask, feather=width)
    steps = [min(d / (width + 1), 1) for d in range(1, 45)]
    assert weights[0, 24, 20:].tolist() == pytest.approx([3 * t**2 - 2 * t**3 for t in steps], abs=1e-6)
    assert int((weights[0, 24, 20:] < 1).sum()) == width


def test_a_colour_that_the_outside_never_shows_is_not_carried_away():
    """A map of greater contrast outside; the edit's own white is changed no more than the outside's colours are."""
    source = 0.3 + 0.1 * pictures(seed=3)
    edited = 0.5 * source + 0.15
    edited[box() == 1] = 0.95
    image, weights, report, _ = keep(source, edited, box(), colour_match="mean and spread")
    assert "colours changed (mean and spread)" in report
    most = float((source - edited)[weights == 0].max())
    assert float((image - edited)[weights == 1].max()) <= most + 1e-6


def test_the_defaults_keep_the_outside_too():
    source, edited, mask = scene()
    image, weights, report, difference = KeepOutside.execute(source, edited, mask, **defaults()).args
    assert torch.equal(bits(image[weights == 0]), bits(source[weights == 0]))
    assert difference == 0.0
    assert "largest difference outside 0 (1 picture, every bit compared)" in report


def test_an_edit_that_lies_in_place_with_the_right_colours_goes_in_as_it_is():
    source, edited, mask = scene()
    image, weights, report, _ = KeepOutside.execute(source, edited, mask, **defaults()).args
    assert torch.equal(image[weights == 1], edited[weights == 1])
    assert "lies in place" in report
    assert "has the source's colours" in report


def test_an_empty_mask_gives_the_source_back_and_says_so():
    source = pictures()
    image, weights, report, difference = keep(source, pictures(seed=1), torch.zeros(1, 64, 64), align="sub-pixel")
    assert torch.equal(bits(image), bits(source))
    assert float(weights.max()) == 0
    assert difference == 0.0
    assert "the mask is black" in report


def test_a_full_mask_gives_the_edit_and_says_that_nothing_was_matched():
    edited = pictures(seed=1)
    image, weights, report, difference = keep(
        pictures(), edited, torch.ones(1, 8, 8), feather=9, align="sub-pixel", colour_match="linear"
    )
    assert torch.equal(image, edited)
    assert float(weights.min()) == 1
    assert difference == 0.0
    assert report.count("too little is left outside the mask") == 2


def test_a_large_picture_is_put_together_in_bands_without_a_seam(monkeypatch):
    given = pictures(channels=4), pictures(channels=4, seed=1), torch.rand(1, 48, 64).round(decimals=1)
    whole = keep(*given, feather=2)
    monkeypatch.setattr(compositing, "BAND", 5 * 64)
    assert len(compositing.bands((48, 64))) == 10
    bands = keep(*given, feather=2)
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], bands[:2], strict=True))


def test_faint_grey_counts_as_black():
    mask = torch.full((1, 48, 64), 0.4 / 255)
    _, _, report, _ = keep(pictures(), pictures(seed=1), mask)
    assert "the mask is black" in report


@pytest.mark.parametrize("size", [(1, 1), (5, 4), (9, 700)])
def test_the_smallest_and_the_oddest_pictures_pass(size):
    source = pictures(1, *size)
    image, _, _, difference = KeepOutside.execute(
        source, pictures(1, *size, seed=1), torch.eye(3)[None], **defaults()
    ).args
    assert image.shape == source.shape
    assert difference == 0.0


def test_inputs_are_left_alone_and_the_same_inputs_give_the_same_picture():
    given = scene()
    copies = [tensor.clone() for tensor in given]
    first = KeepOutside.execute(*given, **defaults()).args
    second = KeepOutside.execute(*given, **defaults()).args
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
    assert torch.equal(first[0], second[0])
    assert first[2] == second[2]


# ------------------------------------------------------------------------------------------- several masks, any size


def test_masks_are_joined():
    one, two = torch.zeros(2, 1, 48, 64)
    one[:, 4:9, 4:9] = 1
    two[:, 20:30, 30:50] = 0.5
    _, weights, *_ = keep(pictures(), pictures(seed=1), one, more_masks={"mask_0": two, "mask_1": None})
    assert torch.equal(weights, torch.maximum(one, two))


def test_an_inverted_mask_replaces_what_no_mask_shows():
    one, two = box(), torch.zeros(1, 48, 64)
    two[:, 40:] = 1
    _, weights, *_ = keep(pictures(), pictures(seed=1), one, more_masks={"mask_0": two}, invert_mask=True)
    assert torch.equal(weights, 1 - torch.maximum(one, two))


@pytest.mark.parametrize("size", [(24, 32), (96, 128), (31, 77), (1, 1)])
def test_a_mask_of_any_size_is_resized(size):
    mask = torch.zeros(size)
    mask[: max(1, size[0] // 2)] = 1
    source = pictures()
    image, weights, *_ = keep(source, pictures(seed=1), mask)
    assert weights.shape == (1, 48, 64)
    assert torch.equal(image[weights == 0], source[weights == 0])


# ------------------------------------------------------------------------------------------------------------ batches


def test_one_source_serves_many_edits():
    source, edited = pictures(), pictures(3, seed=1)
    image, weights, *_ = keep(source, edited, box())
    assert image.shape == (3, 48, 64, 3)
    for i in range(3):
        assert torch.equal(image[i], keep(source, edited[i : i + 1], box())[0][0])
    assert weights.shape == (3, 48, 64)


def test_each_picture_may_have_its_own_source_and_mask():
    source, edited, mask = (
        pictures(3),
        pictures(3, seed=1),
        torch.stack([box()[0], torch.zeros(48, 64), 1 - box()[0]]),
    )
    image, weights, report, _ = keep(source, edited, mask)
    assert torch.equal(weights, mask)
    assert torch.equal(image[1], source[1])
    assert "picture 2: nothing is replaced" in report
    assert "3 pictures" in report


@pytest.mark.parametrize(
    ("sources", "edits", "masks", "named"),
    [
        (2, 3, 1, "source has 2 pictures and edited has 3"),
        (3, 1, 1, "source has 3 pictures and edited has 1"),
        (1, 3, 2, "mask 1 has 2 pictures and edited has 3"),
        (1, 1, 2, "mask 1 has 2 pictures and edited has 1"),
    ],
)
def test_batches_that_do_not_go_together_are_refused_by_name(sources, edits, masks, named):
    with pytest.raises(ValueError, match=named):
        keep(pictures(sources), pictures(edits, seed=1), box(count=masks))


def test_a_further_mask_of_another_batch_is_refused_by_its_number():
    with pytest.raises(ValueError, match="mask 2 has 4 pictures"):
        keep(pictures(), pictures(seed=1), box(), more_masks={"mask_0": box(count=4)})


def test_a_long_batch_can_be_stopped_between_pictures(monkeypatch):
    def stop():
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        keep(pictures(), pictures(seed=1), box())


# ----------------------------------------------------------------------------------------- channels, precision, size


def test_transparency_of_the_source_is_kept():
    source = pictures(channels=4)
    image, *_ = keep(source, pictures(seed=1), box(), feather=3)
    assert image.shape[-1] == 4
    assert torch.equal(image[..., 3], source[..., 3])


def test_a_transparent_edit_lets_the_source_through():
    source, edited = pictures(), pictures(channels=4, seed=1)
    edited[..., 3] = 0
    edited[:, :20, :, 3] = 1
    image, weights, *_ = keep(source, edited, box())
    assert image.shape[-1] == 3
    assert float(weights[:, 20:].max()) == 0
    assert torch.equal(image[:, 20:], source[:, 20:])


def test_transparency_of_both_is_mixed():
    source, edited = pictures(channels=4), pictures(channels=4, seed=1)
    image, weights, *_ = keep(source, edited, box())
    assert torch.equal(image[weights == 1], edited[weights == 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_sources_precision_is_kept(dtype):
    source, edited = pictures().to(dtype), pictures(seed=1)
    image, weights, _, difference = keep(source, edited, box(), feather=3, colour_match="linear", align="sub-pixel")
    assert image.dtype == dtype
    assert torch.equal(bits(image[weights == 0]), bits(source[weights == 0]))
    assert difference == 0.0


def test_an_edit_of_another_size_is_resized_and_named():
    source, mask = pictures(1, 50, 70), box(50, 70)
    edited = torch.full((1, 64, 96, 3), 0.25)
    image, weights, report, _ = keep(source, edited, mask)
    assert image.shape == source.shape
    torch.testing.assert_close(image[weights == 1], torch.full_like(image[weights == 1], 0.25))
    assert "resized from 96 x 64 pixels (stretch)" in report


def test_an_edit_of_the_sources_centre_goes_back_to_the_centre():
    source = pictures(1, 40, 80)
    edited = source[:, :, 20:60].clone()
    edited[:, 10:20, 10:20] = 0.5
    image, weights, *_ = keep(source, edited, torch.ones(1, 4, 4), fit="centre crop", grow=8)
    assert torch.equal(image[:, :, 20:60], edited)
    assert torch.equal(image[:, :, :20], source[:, :, :20])
    assert float(weights[:, :, 60:].max()) == 0
    assert float(weights[:, :, 20:60].min()) == 1


@pytest.mark.parametrize("size", [(125, 131), (121, 128), (128, 135)])
def test_an_edit_of_a_picture_that_the_vae_cut_goes_back_where_it_was_cut(inference, pocket_vae, size):
    source, edited, mask = (resized(each, size) for each in scene())
    decoded = pocket_vae.vae_encode_crop_pixels(edited)
    image, weights, report, _ = KeepOutside.execute(source, decoded, mask, **defaults() | {"feather": 0}).args
    assert "shows the middle of the source" in report and "moved back" not in report
    assert error_inside(image, edited, weights) < 0.002
    image, weights, *_ = keep(source, decoded, torch.ones_like(mask), fit="automatic")
    assert float(weights.min()) == 1  # up to the picture's border
    stretched, weights, *_ = KeepOutside.execute(
        source, decoded, mask, **defaults() | {"feather": 0, "fit": "stretch"}
    ).args
    assert error_inside(stretched, edited, weights) > 0.004
    through = KeepOutside.execute(source, pocket_vae.decode(pocket_vae.encode(edited)), mask, **defaults()).args
    assert "shows the middle of the source" in through[2]


@pytest.mark.parametrize("size", [(125, 131), (128, 135)])
def test_an_edit_of_that_size_that_was_resized_is_stretched(size):
    source, edited, mask = (resized(each, size) for each in scene())
    small = resized(edited, tuple(side // 8 * 8 for side in size))
    *_, report, _ = KeepOutside.execute(source, small, mask, **defaults()).args
    assert "(stretch)" in report


def resized(picture, size):
    """A picture or mask (1, h, w[, C]) at another size."""
    flat = picture.reshape(1, *picture.shape[1:3], -1).movedim(-1, 1)
    new = torch.nn.functional.interpolate(flat, size=size, mode="bicubic", antialias=True).movedim(1, -1).clamp(0, 1)
    return new if picture.ndim == 4 else (new[..., 0] > 0.5).float()


# ------------------------------------------------------------------------------------------------- shift and colour


def shifted_and_tinted(edited):
    """The edit as a model might return it: 1.3 px to the right, 0.7 px up, warmer and flatter."""
    moved = shifted_back(edited[0].double(), -1.3, 0.7)[None].float().clamp(0, 1)
    return moved * torch.tensor([0.92, 0.88, 0.8]) + torch.tensor([0.06, 0.03, 0.01])


def error_inside(image, wanted, weights):
    return (image - wanted)[weights == 1].abs().mean().item()


def test_a_shifted_and_tinted_edit_is_brought_back():
    source, ideal, mask = scene()
    edited = shifted_and_tinted(ideal)
    raw, weights, *_ = keep(source, edited, mask)
    aligned, _, report, _ = keep(source, edited, mask, align="sub-pixel")
    matched, _, _, _ = keep(source, edited, mask, colour_match="linear")
    both, _, report, _ = keep(source, edited, mask, align="sub-pixel", colour_match="mean and spread")
    found = [word for word in report.replace(",", " ").split() if word[0] in "+-"][:2]
    assert float(found[0]) == pytest.approx(1.3, abs=0.05)
    assert float(found[1]) == pytest.approx(-0.7, abs=0.05)
    errors = [error_inside(image, ideal, weights) for image in (raw, aligned, matched, both)]
    assert errors[3] < 0.3 * min(errors[:3])
    assert "which brings the difference outside" in report


def test_whole_pixels_keep_the_edits_own_values():
    source, ideal, mask = scene()
    edited = torch.roll(ideal, (2, -3), (1, 2))
    image, weights, report, _ = keep(source, edited, mask, align="whole pixels")
    assert torch.equal(image[weights == 1], ideal[weights == 1])
    assert "-3.00 px right and +2.00 px down" in report


def test_another_scene_outside_matches_nothing():
    source, _, mask = scene()
    noise = pictures(1, 128, 128, seed=5)
    image, weights, report, _ = keep(source, noise, mask, align="sub-pixel", colour_match="linear")
    assert report.count("little in common") == 2
    assert torch.equal(image[weights == 1], noise[weights == 1])


def test_matching_stays_within_the_range_of_both_pictures():
    source, ideal, mask = scene()
    image, *_ = keep(source, shifted_and_tinted(ideal), mask, align="sub-pixel", colour_match="linear")
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("which", ["source", "edited", "mask 1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused_by_name(which, value):
    given = {"source": pictures(), "edited": pictures(seed=1), "mask 1": box()}
    given[which][0, 3, 3] = value
    with pytest.raises(ValueError, match=f"{which} holds NaN"):
        keep(*given.values())


@pytest.mark.parametrize("which", [0, 1])
def test_pictures_of_other_channels_are_refused(which):
    given = [pictures(), pictures(seed=1)]
    given[which] = given[which][..., :1]
    with pytest.raises(ValueError, match="3 \\(RGB\\) or 4 \\(RGBA\\) channels"):
        keep(*given, box())


def test_a_fault_would_be_raised_and_not_returned():
    source = pictures()[0]
    result, outside = source.clone(), torch.ones(48, 64, dtype=torch.bool)
    assert compositing.proved(source, result, outside) == 0.0
    result[3, 3, 0] = torch.nextafter(result[3, 3, 0], torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="this is a fault"):
        compositing.proved(source, result, outside)


def test_every_setting_reaches_its_field(monkeypatch):
    chosen = {"grow": 3, "feather": 5, "colour_match": "linear", "align": "whole pixels", "fit": "centre crop"}
    seen, keep = [], compositing.keep
    monkeypatch.setattr(compositing, "keep", lambda *given: seen.append(given[-1]) or keep(*given))
    KeepOutside.execute(pictures(), pictures(seed=1), box(), **chosen, invert_mask=True)
    assert [settings.named() for settings in seen] == [chosen | {"invert_mask": True}]


def test_the_settings_are_the_schemas_inputs_with_its_defaults():
    assert compositing.KeepOutsideSettings().named() == defaults()


def test_what_was_found_is_in_the_history_too():
    done = KeepOutside.execute(pictures(), pictures(seed=1), box(), **PLAIN)
    assert done.ui == {"text": [done.args[2]]}


def test_every_socket_of_the_schema_is_taken():
    schema = KeepOutside.define_schema()
    sockets = {
        name
        for name, given in inspect.signature(KeepOutside.execute).parameters.items()
        if given.kind.name != "VAR_KEYWORD"
    }
    assert {item.id for item in schema.inputs} == sockets | set(defaults())
    assert "more_masks" in KeepOutside.GET_NODE_INFO_V1()["input"]["optional"]
    assert all(item.tooltip and item.tooltip.endswith(".") for item in [*schema.inputs, *schema.outputs])
