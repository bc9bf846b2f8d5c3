"""Exact text's equations: rectangles, orders, distances, embeddings; and the recogniser against published numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from exact_text.make_recogniser import drawn_lines
from palimpsest.kernels import exact_text as maths
from palimpsest.kernels import text_recognition as recognition
from palimpsest.nodes.exact_text import TextEmbedder, shipped_recogniser
from palimpsest.nodes.exact_text import recogniser as shipped

# onnxruntime's, of ch_PP-OCRv3_rec_infer.onnx, as make_recogniser prints them: neck[:, 19, ::8] of its four lines.
NECK = [
    [2.469, 2.752, 2.343, 1.393, 2.072, 4.933, 2.099, 4.514],
    [1.642, -0.223, -0.081, 0.567, 0.186, 1.848, 0.336, -0.038],
    [1.704, 0.676, 2.164, 2.787, 5.018, 5.001, 3.083, 0.883],
    [2.029, 4.589, 0.981, 2.356, 0.092, 4.487, -0.262, 3.192],
]
HALF = 0.1  # of values up to 10.4: what weights in half precision move them by at most is 0.088, by the same script


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def corners(rectangle):
    """The corners (4, 2) of a rectangle."""
    along, down = (torch.tensor(axis, dtype=torch.float64) for axis in rectangle.axes)
    w, h = along * rectangle.width / 2, down * rectangle.height / 2
    return torch.tensor(rectangle.centre, dtype=torch.float64) + torch.stack([-w - h, w - h, w + h, h - w])


# ------------------------------------------------------------------------------------------------------ the recogniser


def test_the_shipped_network_gives_what_the_published_one_gives():
    with torch.no_grad():
        neck = shipped_recogniser().features(drawn_lines(recognition))
    assert neck.shape == (4, 40, 64)
    assert float((neck[:, 19, ::8] - torch.tensor(NECK)).abs().max()) < HALF


def test_gradients_reach_the_pixels_even_if_it_was_first_read_without():
    shipped.shipped_recogniser.cache_clear()
    with torch.inference_mode():
        shipped_recogniser()
    pictures = drawn_lines(recognition)[:1].requires_grad_()
    shipped_recogniser().features(pictures).square().mean().backward()
    assert float(pictures.grad.abs().sum()) > 0


def test_wide_lines_and_wrong_ones():
    network = recognition.Recogniser(classes=5)
    assert network.features(torch.zeros(1, 3, 48, 328)).shape == (1, 41, 64)
    assert network(torch.zeros(2, 3, 48, 320)).shape == (2, 40, 5)
    with pytest.raises(ValueError, match=r"need prepared lines \(L, 3, 48, W\)"):
        network.features(torch.zeros(1, 3, 32, 320))
    with pytest.raises(ValueError, match="prepared: need a line"):
        recognition.prepared(torch.zeros(4, 48, 320))


def test_a_line_is_prepared_as_anytext_does():
    """512 x 80 becomes 308 x 48 with corners on corners, values -1..1, zeros behind; what is high is turned."""
    line = random(1, 80, 512).sigmoid()
    found = recognition.prepared(line)
    expected = F.interpolate(line[None].float(), (48, 308), mode="bilinear", align_corners=True)[0] * 2 - 1
    assert found.shape == (3, 48, 320)
    torch.testing.assert_close(found[:1, :, :308], expected)
    assert not found[:, :, 308:].any()
    assert torch.equal(recognition.prepared(line.transpose(1, 2).flip(2)), found), "turned back counterclockwise"
    assert recognition.prepared(torch.ones(1, 20, 400), most=None).shape == (3, 48, 960)
    assert recognition.prepared(torch.ones(1, 20, 400)).shape == (3, 48, 320)


def test_the_best_path_merges_repetitions_and_leaves_blanks_out():
    letters = ("", "a", "b", " ")
    path = torch.tensor([1, 1, 0, 1, 2, 2, 3, 0])
    logits = torch.full((8, 4), -50.0).scatter(1, path[:, None], 50.0)
    assert recognition.best_path(logits, letters) == recognition.Reading("aab", 1.0)
    assert recognition.best_path(logits[2:3], letters) == recognition.Reading("", 0.0)
    with pytest.raises(ValueError, match=r"need \(N, 4\) scores"):
        recognition.best_path(logits[:, :3], letters)


def test_the_alphabet_has_a_character_for_every_class():
    found = shipped.alphabet()
    assert len(found) == recognition.CLASSES
    assert (found[0], found[-1]) == ("", " ")
    assert set("AZaz09&") <= set(found)
    assert {"\u4e2d", "\u6587"} <= set(found)


def test_a_damaged_file_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FILE", tmp_path / "reader.safetensors")
    for function in (shipped.shipped_recogniser, shipped.alphabet):
        function.cache_clear()
        for content in (None, b"nonsense"):
            if content:
                shipped.FILE.write_bytes(content)
            with pytest.raises(ValueError, match=r"reader.safetensors cannot be read .*: install Palimpsest again"):
                function()
        function.cache_clear()
        shipped.FILE.unlink()


# ------------------------------------------------------------------------------------------------------- the embedding


def test_an_embedding_is_the_normalised_projection():
    neck, weight, bias = random(2, 3, 4), random(6, 12, seed=1), random(6, seed=2)
    scale, shift = random(6, seed=3), random(6, seed=4)
    found = maths.token_embedding(neck, weight, bias, norm_weight=scale, norm_bias=shift)
    x = neck.reshape(2, 12) @ weight.T + bias
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * scale + shift
    torch.testing.assert_close(found, expected)
    for kind, near in ((torch.float32, 1e-5), (torch.float16, 2e-2)):
        lower = [t.to(kind) for t in (neck, weight, bias)]
        low = maths.token_embedding(*lower, norm_weight=scale.to(kind), norm_bias=shift.to(kind))
        torch.testing.assert_close(low.double(), expected, rtol=near, atol=near)
    with pytest.raises(ValueError, match="do not fit"):
        maths.token_embedding(neck[:, :2], weight, bias, norm_weight=scale, norm_bias=shift)


def test_a_text_embedder_takes_lines_one_by_one():
    ones = torch.ones(24)
    weight = random(24, 2560, dtype=torch.float32) / 50
    projection = {"weight": weight, "bias": ones * 0, "norm_weight": ones, "norm_bias": ones * 0}
    embedder = TextEmbedder(shipped_recogniser(), projection)
    strips = torch.stack([(random(80, 512, seed=seed) > 0.5).float() for seed in range(3)])
    found = embedder.embed(strips)
    assert found.shape == (3, 24)
    assert embedder.width == 24
    torch.testing.assert_close(found[1:2], embedder.embed(strips[1:2]), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- the place


def test_the_hull_of_a_cross_is_its_eight_outer_corners():
    arms = [(x, y) for x in (1, 2) for y in (0, 3)] + [(x, y) for x in (0, 3) for y in (1, 2)]
    found = maths.convex_hull(torch.tensor([*arms, (1, 1), (2, 2), (1, 2), (2, 1), (1, 0)], dtype=torch.float32))
    assert set(map(tuple, found.tolist())) == set(arms)


@pytest.mark.parametrize("angle", [0.0, 17.0, 45.0, 89.0, 90.0, -1.0, -60.0])
def test_the_least_rectangle_of_a_turned_one_is_itself(angle):
    wanted = maths.Rectangle((31.5, 40.25), angle, width=50.0, height=12.0)
    inside = corners(wanted).mean(0)[None] * 0.3 + corners(wanted) * 0.7
    found = maths.least_rectangle(maths.convex_hull(torch.cat([corners(wanted), inside])))
    assert found.angle == pytest.approx(angle, abs=1e-3)
    assert (*found.centre, found.width, found.height) == pytest.approx((31.5, 40.25, 50.0, 12.0), abs=1e-3)


def test_what_is_steep_is_written_downwards():
    steep = maths.Rectangle((0.0, 0.0), -85.0, width=50.0, height=12.0)
    assert steep.is_steep(10)
    assert not steep.is_steep(3)
    standing = steep.standing()
    assert (standing.angle, standing.width, standing.height) == (5.0, 12.0, 50.0)
    assert {tuple(p) for p in corners(standing).round(decimals=9).tolist()} == {
        tuple(p) for p in corners(steep).round(decimals=9).tolist()
    }
    assert not maths.Rectangle((0.0, 0.0), 90.0, width=9.0, height=9.0).is_steep(10), "a square is level"


def test_a_polygon_needs_three_corners():
    with pytest.raises(ValueError, match="m >= 3"):
        maths.least_rectangle(torch.zeros(2, 2))


def test_rectified_is_the_crop_where_nothing_is_turned():
    picture = random(3, 20, 31, dtype=torch.float32)
    found = maths.rectified(picture, maths.Rectangle((12.0, 9.0), 0.0, width=10.0, height=6.0))
    torch.testing.assert_close(found, picture[:, 6:12, 7:17], rtol=1e-4, atol=1e-4)


def test_rectified_turns_text_level():
    """A quarter turn is exact: what runs upwards runs to the right."""
    picture = random(3, 24, 24, dtype=torch.float32)
    found = maths.rectified(picture, maths.Rectangle((12.0, 12.0), 90.0, width=16.0, height=6.0))
    torch.testing.assert_close(found, picture[:, 4:20, 9:15].rot90(-1, (1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows_first", "expected"), [(True, [0, 1, 3, 2]), (False, [0, 3, 2, 1])])
def test_places_are_read_by_bands_of_a_fifth(rows_first, expected):
    """A line a little higher than its neighbour does not come first: bands of 102 pixels of 512, as AnyText's."""
    centres = torch.tensor([[50.0, 60.0], [400.0, 10.0], [90.0, 300.0], [60.0, 110.0]])
    assert maths.reading_order(centres, (512, 512), rows_first=rows_first) == expected


# -------------------------------------------------------------------------------------------------------- the distance


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("kitten", "sitting", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("ab", "ab", 0)],
)
def test_the_edit_distance(a, b, distance):
    assert maths.edit_distance(a, b) == maths.edit_distance(b, a) == distance
    assert maths.similarity(a, b) == pytest.approx(1 - distance / max(len(a), len(b), 1))


def test_a_rectangle_in_a_picture_of_another_size():
    found = maths.Rectangle((10.0, 20.0), 0.0, width=8.0, height=4.0).scaled(2.0, 3.0)
    assert found == maths.Rectangle((20.0, 60.0), 0.0, width=16.0, height=12.0)
    turned = maths.Rectangle((10.0, 20.0), 30.0, width=8.0, height=4.0).scaled(2.0, 2.0)
    assert (turned.width, turned.height, turned.angle) == pytest.approx((16.0, 8.0, 30.0))
    assert math.isclose(turned.grown(1.0).height, 10.0)


def test_a_part_of_a_rectangle():
    """Of a quarter turn: what lies to the right lies above."""
    whole = maths.Rectangle((10.0, 10.0), 90.0, width=20.0, height=8.0)
    found = whole.part((5.0, 20.0), (0.0, 4.0))
    expected = torch.tensor([[6.0, 15.0], [6.0, 0.0], [10.0, 0.0], [10.0, 15.0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.part((0, 20), (0, 8)).double(), corners(whole), rtol=0, atol=1e-4)
