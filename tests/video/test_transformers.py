"""Video Attention on image transformers: what a layer does, equal frames, who sees whom, identity, and refusals."""

import inspect
import math

import pytest
import tiny_models
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from harness import acts, assert_close
from palimpsest.nodes import host
from palimpsest.nodes.attention_map.nodes import AttentionMap
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from palimpsest.nodes.video.nodes import VideoAttention
from palimpsest.nodes.words import ChosenWords
from tiny_transformers import EVERY, FAMILIES, latent, own_run, prompt, sample

FRAMES = 3
SEEN = {"own, first and previous": [(0, 0, 0), (1, 0, 0), (2, 0, 1)], "previous": [(0,), (0,), (1,)]}
families = pytest.mark.parametrize("family", FAMILIES)
some = pytest.mark.parametrize("family", ["flux", "zimage"])

pytestmark = pytest.mark.usefixtures("inference")


def video(model, **settings):
    return tiny_models.execute(VideoAttention, model=model, **settings)[0]


def noise(family, frames=FRAMES, seed=3):
    """Of frames that differ."""
    return torch.randn(latent(family, frames).shape, generator=torch.Generator().manual_seed(seed))


def drawn(model, family, start, tokens=9, positive=None, **settings):
    texts = positive or prompt(family, 1, tokens), prompt(family, 2)
    return sample(model, *texts, torch.zeros_like(start), noise=start, **settings)


def equal_frames(family):
    return noise(family, 1).repeat_interleave(FRAMES, 0)


# ---- the equation


@pytest.mark.parametrize("look_at", SEEN)
@families
def test_a_layer_does_what_the_equation_says(models, family, look_at):
    """Every query on the own text and on the frames' pictures, of which each weighs 1/n; by hand, prompt by prompt."""
    patched, seen = video(models(family), look_at=look_at), []

    def spy(attention):
        if attention.layer is None:
            return None
        seen.append((attention, attention.attended()))
        return seen[-1][1]

    host.replace_joint(patched, host.family_of(patched), "spy", lambda earlier: spy, host.RECORDED)
    drawn(patched, family, noise(family), steps=1)
    assert len(seen) >= 2
    for attention, out in seen:
        image, rows = attention.sequence.image, len(attention.query)
        assert rows == 2 * FRAMES
        for row in range(rows):
            frames = [row - row % FRAMES + frame for frame in SEEN[look_at][row % FRAMES]]
            key, value = (
                torch.cat([t[row, :, : image.start], *(t[f, :, image] for f in frames), t[row, :, image.stop :]], 1)
                for t in (attention.key.double(), attention.value.double())
            )
            scores = attention.query[row].double() @ key.mT / math.sqrt(key.shape[-1])
            scores[..., image.start : image.start + len(frames) * attention.sequence.places] -= math.log(len(frames))
            expected = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
            torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("look_at", ["own, first and previous", "all", "middle"])
@families
def test_equal_frames_are_drawn_as_one_is(models, family, look_at):
    model, start = models(family), equal_frames(family)
    alone = drawn(model, family, start[:1], tokens=12)
    found = drawn(video(model, look_at=look_at), family, start, tokens=12)
    assert (found - alone).norm() < 1e-5 * found.norm()


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_so_they_are_where_the_prompt_has_a_mask_of_its_own(models, family):
    model, start = models(family), equal_frames(family)
    more = {"attention_mask": torch.tensor([[1] * 6 + [0] * 3])}
    if family == "flux":  # as the host's Apply Style Model gives it, but over the picture as well
        scores = torch.randn(1, 9 + 24, 9 + 24, generator=torch.Generator().manual_seed(4))
        more = {"attention_mask": scores, "attention_mask_img_shape": (6, 4)}
    positive = prompt(family, 1, **more)
    alone = drawn(model, family, start[:1], positive=positive)
    assert acts(alone, drawn(model, family, start[:1]))
    found = drawn(video(model, look_at="all"), family, start, positive=positive)
    assert (found - alone).norm() < 1e-5 * found.norm()


@families
def test_frames_change_those_that_look_at_them_and_no_others(models, family):
    model, start = models(family), noise(family)
    other = torch.cat([start[:2], noise(family, 1, seed=8)])  # of the last frame
    for look_at, changed in (("first", [2]), ("previous", [2]), ("own, first and previous", [2]), ("all", [0, 1, 2])):
        patched = video(model, look_at=look_at)
        one, two = drawn(patched, family, start), drawn(patched, family, other)
        for frame in range(FRAMES):
            if frame in changed:
                assert acts(one[frame], two[frame])
            else:
                torch.testing.assert_close(one[frame], two[frame], rtol=0, atol=1e-6)
    first = torch.cat([noise(family, 1, seed=8), start[1:]])
    patched = video(model)
    one, two = drawn(patched, family, start), drawn(patched, family, first)
    assert all(acts(one[frame], two[frame]) for frame in range(FRAMES))


@families
def test_what_does_nothing_is_bit_equal_and_the_model_stays_itself(models, family):
    model, start = models(family), noise(family)
    plain, single = drawn(model, family, start), drawn(model, family, start[:1])
    assert torch.equal(drawn(video(model, strength=0.0), family, start), plain)
    assert torch.equal(drawn(video(model, clip_length=1), family, start), plain)
    assert torch.equal(drawn(video(model, start_percent=0.9, end_percent=0.95), family, start), plain)
    assert torch.equal(drawn(video(model, look_at="all"), family, start[:1]), single)
    full, half = (drawn(video(model, strength=strength), family, start) for strength in (1.0, 0.5))
    assert acts(full, plain)
    assert (half - plain).norm() < (full - plain).norm()
    assert (half - full).norm() < (full - plain).norm()
    assert torch.equal(drawn(model, family, start), plain)


# ---- clips, layers, steps


@pytest.mark.parametrize("look_at", ["first and previous", "all"])
@families
def test_clips_of_one_batch_do_not_see_each_other(models, family, look_at):
    model, start = models(family), noise(family, 4)
    together = drawn(video(model, look_at=look_at, clip_length=2), family, start)
    for clip in (slice(0, 2), slice(2, 4)):
        assert_close(together[clip], drawn(video(model, look_at=look_at), family, start[clip]))
    with pytest.raises(ValueError, match="no whole number of clips of 3 frames"):
        drawn(video(model, clip_length=3), family, start)


@some
def test_layers_and_steps_are_chosen(models, family):
    model, start = models(family), noise(family)
    plain, full = drawn(model, family, start), drawn(video(model), family, start)
    for settings in ({"layers": "decoder"}, {"end_percent": 0.3}, {"start_percent": 0.3}):
        found = drawn(video(model, **settings), family, start)
        assert acts(found, plain), settings
        assert acts(found, full), settings


def windows(model):
    """Of two frames, one after another; without the frame before in front, of which older hosts know nothing."""
    chosen = {"context_length": 2, "context_overlap": 0, "context_schedule": "batched"}
    if "causal_window_fix" in inspect.signature(ContextWindowsManualNode.execute).parameters:
        chosen["causal_window_fix"] = False
    return tiny_models.execute(ContextWindowsManualNode, model=model, **chosen)[0]


@pytest.mark.parametrize("family", ["flux", "qwen", "sd3"])
def test_in_the_hosts_windows_the_frames_of_one_are_the_clip(models, family):
    model, start = models(family), noise(family, 4)
    clips = drawn(video(model, clip_length=2), family, start)
    assert_close(drawn(windows(video(model)), family, start), clips)
    assert_close(drawn(windows(video(model, clip_length=2)), family, start), clips)


# ---- beside others


def words(model, family):
    """Cross-Attention Mask: two words in the left half."""
    positive = prompt(family, 1)
    half = torch.zeros(1, 96, 64)
    half[..., :32] = 1
    chosen = ChosenWords(("cat", "red"), ((3, 4), (6,)), positive[0][0])
    inputs = {"tokens": chosen, "mask": half, "mode": "after softmax, renormalised", "mask_negative": False}
    return tiny_models.execute(CrossAttentionMask, model=model, **inputs)[0]


def source(model, family, mode="extend", pictures=1):
    """Apply KV of the model's own run."""
    kv = tiny_models.execute(
        TuneKV, model=model, trajectory=own_run(model, family, pictures)[0], positive=prompt(family, 1),
        inner_steps=0, layers="all",
    )[0]  # fmt: skip
    return lambda model, family: tiny_models.execute(
        ApplyKV, model=model, kv=kv, mode=mode, start_percent=0.0, source_guidance=1.0, layers="all"
    )[0]


def assert_both_act(theirs, model, family, **settings):
    """In either order of the nodes alike."""
    start = noise(family, 2)
    both = drawn(theirs(video(model, **settings), family), family, start)
    assert_close(drawn(video(theirs(model, family), **settings), family, start), both)
    assert acts(both, drawn(theirs(model, family), family, start))
    assert acts(both, drawn(video(model, **settings), family, start))


@families
def test_words_in_regions_act_beside_it_in_either_order(models, family):
    assert_both_act(words, models(family), family)


@pytest.mark.parametrize("mode", ["extend", "frozen"])
@pytest.mark.parametrize("family", ["flux", "sd3", "zimage"])
def test_a_source_acts_beside_it_in_either_order(models, family, mode):
    model = models(family)
    assert_both_act(source(model, family, mode, pictures=2), model, family)


def test_a_source_of_one_picture_has_no_clip(models):
    model = models("flux")
    assert_both_act(source(model, "flux"), model, "flux", clip_length=2)


@some
def test_words_keep_their_share_of_the_attention(models, family):
    """Of equal frames as of one, by Attention Map."""
    model, start = models(family), equal_frames(family)
    tokens = ChosenWords(("cat",), ((3, 4),), prompt(family, 1)[0][0])

    def shares(made, start):
        patched, found = tiny_models.execute(AttentionMap, model=made, tokens=tokens)[:2]
        (level,) = found.of(drawn(patched, family, start)).levels.values()
        return level

    one, three = shares(model, start[:1]), shares(video(model, look_at="all"), start)
    assert three.shape[1] == FRAMES
    torch.testing.assert_close(three, one.expand_as(three), rtol=1e-4, atol=1e-6)


def test_an_override_of_another_node_computes_it(models):
    model, start, seen = models("flux"), noise("flux"), []
    expected = drawn(video(model), "flux", start)

    def theirs(function, q, k, v, heads, mask=None, **named):
        seen.append((q.shape[2], k.shape[2], None if mask is None else tuple(mask.shape)))
        return function(q, k, v, heads, mask=mask, **named)

    watched = model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = theirs
    assert torch.equal(drawn(video(watched), "flux", start), expected)
    tokens, keys = 9 + 24, 9 + 3 * 24
    assert set(seen) == {(tokens, keys, (1, 1, 1, keys))}  # no matrix of tokens and keys
    seen.clear()
    drawn(video(watched, look_at="first"), "flux", start)
    assert set(seen) == {(tokens, tokens, None)}


def test_two_nodes_share_the_layers_or_the_steps(models):
    model, start = models("flux"), noise("flux")
    early = video(model, look_at="all", end_percent=0.3)
    both = drawn(video(early, start_percent=0.3), "flux", start)
    assert acts(both, drawn(early, "flux", start))
    with pytest.raises(ValueError, match="2 Video Attention nodes act in the same layers"):
        drawn(video(early), "flux", start)


# ---- refusals


@pytest.mark.parametrize("family", [name for name in EVERY if name not in FAMILIES])
def test_models_whose_frames_see_each_other_are_refused_by_name(models, family):
    model = models(family)
    with pytest.raises(ValueError, match=r"the frames of a video already do.*load an image model") as caught:
        video(model)
    assert host.family_of(model).name in str(caught.value)


@families
def test_what_only_u_nets_have_is_refused(models, family):
    model = models(family)
    for layers in ("finest", "all but the finest"):
        with pytest.raises(ValueError, match=r"at one size: set layers to all or decoder"):
            video(model, layers=layers)
    with pytest.raises(ValueError, match="set temporal to 0"):
        video(model, temporal=0.3)
