"""Attention across frames: which frames, and the gathered tokens against the equation written out per frame."""

import pytest
import torch
from palimpsest.kernels import video_attention as maths
from palimpsest.kernels.kv_inversion import attention


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def named(look_at, frames):
    return [look_at(frame, frames - 1) for frame in range(frames)]


@pytest.mark.parametrize(
    ("look_at", "expected"),
    [
        (maths.first_and_previous, [(0, 0), (0, 0), (0, 1), (0, 2)]),
        (maths.own_first_and_previous, [(0, 0, 0), (1, 0, 0), (2, 0, 1), (3, 0, 2)]),
        (maths.own_and_first, [(0, 0), (1, 0), (2, 0), (3, 0)]),
        (maths.first, [(0,)] * 4),
        (maths.previous, [(0,), (0,), (1,), (2,)]),
        (maths.middle, [(1,)] * 4),
        (maths.every, [(0, 1, 2, 3)] * 4),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_frames_that_each_frame_of_four_looks_at(look_at, expected):
    assert named(look_at, 4) == expected


@pytest.mark.parametrize("clips", [1, 2])
def test_sparse_causal_attention_is_the_papers_equation(clips):
    """Attention(Q_i, W^K [z_1; z_(i-1)], W^V [z_1; z_(i-1)]), frame by frame."""
    frames, tokens, channels, heads = 5, 6, 8, 2
    query, key, value = (random(clips * frames, tokens, channels, seed=seed) for seed in range(3))
    sources = torch.tensor(named(maths.first_and_previous, frames))
    found = attention(query, maths.gathered(key, sources), maths.gathered(value, sources), heads)
    for clip in range(clips):
        rows = range(clip * frames, (clip + 1) * frames)
        for i, row in enumerate(rows):
            seen = [rows[0], rows[max(i - 1, 0)]]
            k, v = (torch.cat([t[r] for r in seen])[None] for t in (key, value))
            torch.testing.assert_close(found[row : row + 1], attention(query[row : row + 1], k, v, heads))


def test_a_frame_that_is_named_twice_is_as_good_as_once():
    query, key, value = (random(1, 6, 8, seed=seed) for seed in range(3))
    twice = torch.tensor([[0, 0]])
    found = attention(query, maths.gathered(key, twice), maths.gathered(value, twice), 2)
    torch.testing.assert_close(found, attention(query, key, value, 2))


def test_every_frame_sees_the_clip_as_one_picture():
    query, key, value = (random(3, 4, 8, seed=seed) for seed in range(3))
    sources = torch.tensor(named(maths.every, 3))
    found = attention(query, maths.gathered(key, sources), maths.gathered(value, sources), 2)
    whole = [t.flatten(0, 1)[None] for t in (query, key, value)]
    torch.testing.assert_close(found.flatten(0, 1)[None], attention(*whole, 2))


def test_tiles_of_a_frame_look_at_the_same_tiles_of_the_others():
    tokens, sources, tiles = random(3, 8, 2), torch.tensor(named(maths.first_and_previous, 3)), 4
    found = maths.gathered(tokens, sources, tiles)
    assert found.shape == (12, 4, 2)
    one_by_one = [maths.gathered(part.contiguous(), sources) for part in tokens.unflatten(1, (tiles, -1)).unbind(1)]
    assert torch.equal(found.unflatten(0, (3, tiles)), torch.stack(one_by_one, 1))


def test_by_place_is_every_place_over_the_frames_of_its_own_clip_and_back():
    tokens = random(2 * 3, 4, 5)
    found = maths.by_place(tokens, 3)
    assert found.shape == (2 * 4, 3, 5)
    for clip in range(2):
        for place in range(4):
            assert torch.equal(found[clip * 4 + place], tokens[clip * 3 : clip * 3 + 3, place])
    assert torch.equal(maths.by_frame(found, 4), tokens)


# ---- text and picture in one sequence


IMAGE = slice(3, 7)  # of nine tokens: text, a picture of four, two more


def sequences(frames=3, clips=2, heads=2, tokens=9, width=5):
    return [random(clips * frames, heads, tokens, width, seed=seed) for seed in range(3)]


def biased(query, key, value, bias):
    return (query @ key.mT / query.shape[-1] ** 0.5 + bias).softmax(-1) @ value


def shown(query, key, value, look_at, frames=3, bias=None):
    sources = torch.tensor(named(look_at, frames))
    bias = torch.zeros(1, 1, 1, key.shape[2], dtype=key.dtype) if bias is None else bias
    bias = maths.share_kept(bias, IMAGE, sources.shape[1])
    assert bias.shape[-1] == key.shape[2] + (sources.shape[1] - 1) * (IMAGE.stop - IMAGE.start)
    return biased(query, *(maths.beside_text(t, IMAGE, sources) for t in (key, value)), bias)


@pytest.mark.parametrize("look_at", [maths.own_first_and_previous, maths.every, maths.previous])
def test_beside_text_frames_have_one_frames_share(look_at):
    """By hand, key by key: e^s for text and rest of the row itself, e^s / F for the picture of each frame it sees."""
    frames, (query, key, value) = 3, sequences()
    found = shown(query, key, value, look_at)
    for row in range(len(query)):
        first, seen = row - row % frames, look_at(row % frames, frames - 1)
        own = [(row, token, 1.0) for token in range(9) if not IMAGE.start <= token < IMAGE.stop]
        others = [(first + frame, token, 1 / len(seen)) for frame in seen for token in range(IMAGE.start, IMAGE.stop)]
        above, below = torch.zeros(2, 9, 5, dtype=torch.float64), torch.zeros(2, 9, 1, dtype=torch.float64)
        for at, token, weight in own + others:
            score = (query[row] * key[at, :, token, None]).sum(-1, keepdim=True) / 5**0.5
            above += weight * score.exp() * value[at, :, token, None]
            below += weight * score.exp()
        torch.testing.assert_close(found[row], above / below)


def test_equal_frames_are_one_frame_and_without_the_weight_they_are_not():
    query, key, value = (t[:1].expand(3, -1, -1, -1) for t in sequences())
    plain = biased(query, key, value, 0.0)
    torch.testing.assert_close(shown(query, key, value, maths.every), plain)
    sources = torch.tensor(named(maths.every, 3))
    alone = biased(query, *(maths.beside_text(t, IMAGE, sources) for t in (key, value)), 0.0)
    assert (alone - plain).norm() > 0.02 * plain.norm()


def test_what_masks_a_picture_masks_each_of_its_frames():
    query, key, value = (t[:1].expand(3, -1, -1, -1) for t in sequences())
    bias = random(1, 1, 9, 9, seed=7)
    bias[..., [1, 4]] = -torch.inf
    torch.testing.assert_close(shown(query, key, value, maths.every, bias=bias), biased(query, key, value, bias))


def test_one_frame_in_the_place_of_the_own_is_all_of_it():
    tokens = sequences()[0]
    found = maths.beside_text(tokens, IMAGE, torch.tensor(named(maths.first, 3)))
    assert torch.equal(found[:, :, IMAGE], tokens[[0, 0, 0, 3, 3, 3]][:, :, IMAGE])
    rest = [0, 1, 2, 7, 8]
    assert torch.equal(found[:, :, rest], tokens[:, :, rest])
    assert torch.equal(maths.share_kept(tokens, slice(1, 3), 1), tokens)
