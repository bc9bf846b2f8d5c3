"""A clip sampled in the host's context windows: every technique finds the frames of a window, or says why it cannot.

Frames of an image model do not see one another, so that a clip sampled in windows is the clip sampled at once, up to
rounding, if every frame meets its own features, keys and masks.
"""

import functools
import inspect
from types import SimpleNamespace

import comfy.samplers
import harness
import pytest
import tiny_models
import torch
from attention_fusion.fusing import CACHED, SAME_STEP, empty, encoder, fuse, inverted, video
from attention_fusion.fusing import sample as sample_fused
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import SamplerCustom
from palimpsest.nodes import host
from palimpsest.nodes.attention_map.nodes import AttentionMap
from palimpsest.nodes.contextdiff.adapter import ContextAdapter
from palimpsest.nodes.contextdiff.network import AdapterConfig, closed
from palimpsest.nodes.contextdiff.nodes import ContextSampler
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.host import frames
from palimpsest.nodes.words import ChosenWords

FRAMES, CAUSAL = 4, "causal_window_fix"
BATCHED = {"context_length": 2, "context_overlap": 0, CAUSAL: False}
WINDOWS = {
    "one after another": BATCHED,
    "overlapping": {"context_length": 3, "context_overlap": 2, "causal_window_fix": False},
    "with the frame before": {"context_length": 2, "context_overlap": 1, "causal_window_fix": True},
    "around the end": {
        "context_length": 3, "context_overlap": 1, "context_schedule": "looped_uniform", "closed_loop": True,
        "causal_window_fix": False,
    },
    "of one frame": {"context_length": 1, "context_overlap": 0, "causal_window_fix": False},
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("inference")
retaining = pytest.mark.skipif(
    "latent_retain_index_list" not in inspect.signature(ContextWindowsManualNode.execute).parameters,
    reason="this host's windows retain no latents",
)
by_windows = pytest.mark.parametrize("settings", WINDOWS.values(), ids=WINDOWS)


def windows(model, **settings):
    chosen = BATCHED | settings
    if CAUSAL not in inspect.signature(ContextWindowsManualNode.execute).parameters and chosen.pop(CAUSAL):
        pytest.skip("this host's windows know no frame before them")
    return tiny_models.execute(ContextWindowsManualNode, model=model, **chosen)[0]


@pytest.fixture(scope="module")
def clip():
    """(model, trajectory, noise, kv) of four frames."""
    with torch.inference_mode():
        model = tiny_models.unet()
        trajectory, noise, *_ = harness.invert(model, tiny_models.latent(FRAMES), steps=3)
        return model, trajectory, noise, harness.tune(model, trajectory, inner_steps=2)[0]


def masks(size=64):
    """One for each frame, all different."""
    found = torch.zeros(FRAMES, size, size)
    for i in range(FRAMES):
        found[i, :, 16 * i : 16 * i + 16] = 1
    return found


def words():
    return ChosenWords(("word",), ((2, 3),), harness.edits()[0][0][0])


def sample(model, noise):
    return harness.sample(model, noise, steps=3)


EDITS = {
    "blend, cached": lambda model, trajectory, kv: blend(model, trajectory, CACHED),
    "blend, same step": lambda model, trajectory, kv: blend(model, trajectory, SAME_STEP),
    "kv, extend": lambda model, trajectory, kv: harness.apply(model, kv, "extend", mask=masks(), source_guidance=3.0),
    "kv, recompute": lambda model, trajectory, kv: harness.apply(model, kv, "recompute", source_mask=masks()),
    "kv, source masks": lambda model, trajectory, kv: harness.apply(model, kv, "extend", source_mask=masks()),
    "kv, frozen": lambda model, trajectory, kv: harness.apply(model, kv, "frozen"),
    "words": lambda model, trajectory, kv: mask_words(model, tokens=words()),
    "every word": lambda model, trajectory, kv: mask_words(model),
}


def blend(model, trajectory, features, **settings):
    inputs = {"trajectory": trajectory, "positive": harness.prompts()[0], "mask": masks(), "source_features": features}
    return tiny_models.execute(FeatureBlend, model=model, **inputs | settings)[0]


def mask_words(model, **settings):
    return tiny_models.execute(CrossAttentionMask, model=model, mask=masks(), **settings)[0]


@pytest.fixture(scope="module")
def at_once(clip):
    """The clip sampled as one, by the name of an edit, and by "" without any."""
    model, trajectory, noise, kv = clip
    edits = EDITS | {"": lambda model, *_: model}

    @functools.cache
    def sampled(edit: str):
        with torch.inference_mode():
            return sample(edits[edit](model, trajectory, kv), noise)

    return sampled


@pytest.mark.parametrize("edit", EDITS)
@by_windows
def test_frames_of_a_window_meet_their_own(clip, at_once, settings, edit):
    model, trajectory, noise, kv = clip
    harness.assert_acts(at_once(edit), at_once(""))
    patched = windows(EDITS[edit](model, trajectory, kv), **settings)
    harness.assert_close(sample(patched, noise), at_once(edit))


def test_one_source_serves_every_frame(clip):
    model, _, noise, _ = clip
    trajectory, *_ = harness.invert(model, steps=3)
    for patched in (
        blend(model, trajectory, CACHED),
        blend(model, trajectory, SAME_STEP, mask=harness.half()),
        harness.apply(model, harness.tune(model, trajectory, inner_steps=1)[0], mask=harness.half()),
    ):
        harness.assert_close(sample(windows(patched), noise), sample(patched, noise))


@pytest.fixture(scope="module")
def fused():
    """(model, text encoder, trajectory, noise) of four frames."""
    with torch.inference_mode():
        text = encoder("sd15")
        model, _, _, trajectory, noise = inverted(text, "sd15", FRAMES)
        return model, text, trajectory, noise


@pytest.mark.parametrize("features", [CACHED, SAME_STEP])
@pytest.mark.parametrize("settings", [{}, {"blend_words": "dog"}, {"mask": masks()}], ids=["all", "words", "mask"])
def test_attention_is_fused_frame_by_frame(fused, settings, features):
    model, text, trajectory, noise = fused
    patched, positive, _ = fuse(model, text, trajectory, source_features=features, **settings)
    together = sample_fused(patched, noise, positive, empty(text))
    for settings in WINDOWS.values():
        found = sample_fused(windows(patched, **settings), noise, positive, empty(text))
        harness.assert_close(found, together)


def test_fused_frames_that_look_at_one_another_in_windows_are_refused_with_a_way_out(fused):
    model, text, trajectory, noise = fused
    patched, positive, _ = fuse(model, text, trajectory, source_features=SAME_STEP)
    with pytest.raises(ValueError, match=r"context windows .* put Video Attention,.* before this node"):
        sample_fused(windows(video(patched)), noise, positive, empty(text))
    way_out, positive, _ = fuse(video(model), text, trajectory, source_features=SAME_STEP)
    assert torch.isfinite(sample_fused(windows(way_out), noise, positive, empty(text))).all()


@by_windows
def test_maps_are_recorded_frame_by_frame(clip, settings):
    model, _, noise, _ = clip
    patched, record = tiny_models.execute(AttentionMap, model=model, tokens=words())[:2]
    together = record.of(sample(patched, noise)).levels
    apart = record.of(sample(windows(patched, **settings), noise)).levels
    assert list(together) == list(apart)
    for grid, level in together.items():
        harness.assert_close(apart[grid], level)


# ---- looking and tuning


def test_nodes_that_look_at_the_source_see_all_frames_at_once(clip):
    model, trajectory, noise, kv = clip
    theirs = windows(model, freenoise=True)
    found, start, *_ = harness.invert(theirs, tiny_models.latent(FRAMES), steps=3)
    assert torch.equal(found.latents, trajectory.latents) and torch.equal(start, noise)
    tuned = harness.tune(theirs, trajectory, inner_steps=2)[0]
    for ours, wanted in zip((*tuned.learned, *tuned.source), (*kv.learned, *kv.source), strict=True):
        assert torch.equal(ours, wanted)
    behind, before = blend(theirs, trajectory, CACHED), windows(blend(model, trajectory, CACHED), freenoise=True)
    assert torch.equal(sample(behind, noise), sample(before, noise))


def test_a_clip_of_another_length_is_refused_by_its_own_number_of_frames(clip):
    model, _, noise, kv = clip
    with pytest.raises(ValueError, match="tuned to 4 pictures, the sampled batch has 3"):
        sample(windows(harness.apply(model, kv)), noise[:3])
    two = tiny_models.execute(CrossAttentionMask, model=model, mask=masks()[:2])[0]
    with pytest.raises(ValueError, match="the mask has 2 pictures, the batch has 4"):
        sample(windows(two), noise)


def test_windows_that_cut_the_picture_are_refused(clip):
    model, trajectory, noise, kv = clip
    for patched in (harness.apply(model, kv), blend(model, trajectory, CACHED)):
        with pytest.raises(ValueError, match=r"context windows cut along dimension 2.*set dim to 0"):
            sample(windows(patched, dim=2), noise)
        assert torch.isfinite(sample(windows(patched, dim=0), noise)).all()


# ---- video


def frames_seen(look_at, shown, length=0):
    from palimpsest.nodes.video.attention import FRAMES as LOOKS
    from palimpsest.nodes.video.frames import sources_in_window

    rows = sources_in_window(LOOKS[look_at], shown, length, torch.device("cpu")).tolist()
    return [[shown[row] for row in seen] for seen in rows]


def test_frames_of_a_window_look_at_one_another_in_the_clips_order():
    assert frames_seen("first and previous", (2, 3, 4)) == [[2, 2], [2, 2], [2, 3]]
    assert frames_seen("first and previous", (4, 5, 0)) == [[0, 0], [0, 4], [0, 0]]
    assert frames_seen("own and first", (0, 3, 4)) == [[0, 0], [3, 0], [4, 0]]  # frame 0 retained
    assert frames_seen("all", (2, 3)) == [[2, 3], [2, 3]]
    assert frames_seen("first", (2, 3, 4, 5), 3) == [[2], [3], [3], [3]]


@retaining
def test_every_window_can_look_at_the_clips_first_frame(clip):
    """As the help page says: with its latent retained, where the frame before stands for the windows' own first."""
    model, _, noise, _ = clip
    patched = video(model, look_at="own and first", end_percent=0.4)  # later steps stand on different latents
    together = sample(patched, noise)
    kept = {"context_length": 2, "context_overlap": 0, "latent_retain_index_list": "0", "causal_window_fix": True}
    harness.assert_close(sample(windows(patched, **kept), noise), together)
    assert harness.acts(sample(windows(patched), noise), together)


def test_clips_in_one_batch_are_sampled_in_windows_that_hold_them(clip):
    model, _, noise, _ = clip
    patched = video(model, clip_length=2, temporal=0.3)
    harness.assert_close(sample(windows(patched, context_schedule="batched"), noise), sample(patched, noise))
    for settings in ({"look_at": "all"}, {"temporal": 0.3}):
        with pytest.raises(ValueError, match=r"context windows cut the clips of 2 frames.* multiple of 2"):
            sample(windows(video(model, clip_length=2, **settings), context_length=3), noise)
        assert torch.isfinite(sample(windows(video(model, **settings), context_length=3), noise)).all()
    with pytest.raises(ValueError, match="the batch has 4 pictures, which is no whole number of clips of 3"):
        sample(windows(video(model, clip_length=3)), noise)


# ---- the context-aware sampler


def by_context(model, noise, positive):
    config = AdapterConfig.for_model(model, tiny_models.SD15["context_dim"], width=32, depth=1, heads=4)
    adapter = ContextAdapter.new(config)
    for name, parameter in adapter.patcher.model.named_parameters():
        if closed(name.removesuffix(".weight")):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    sampler = tiny_models.execute(ContextSampler, context_adapter=adapter)[0]
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    return tiny_models.execute(
        SamplerCustom, model=model, add_noise=False, noise_seed=0, cfg=3.0, positive=positive,
        negative=tiny_models.prompt(2), sampler=sampler, sigmas=levels, latent_image={"samples": noise},
    )[0]["samples"]  # fmt: skip


def test_the_context_aware_sampler_bends_every_frame_alike_in_windows(clip):
    model, _, noise, _ = clip
    one, two = tiny_models.prompt(3), [*tiny_models.prompt(3), *tiny_models.prompt(4)]
    for positive in (one, two):
        harness.assert_close(by_context(windows(model), noise, positive), by_context(model, noise, positive))
    parted = windows(model, split_conds_to_windows=True)
    with pytest.raises(ValueError, match=r"context windows give each window one of them: turn split_conds_to_windows"):
        by_context(parted, noise, two)
    assert torch.isfinite(by_context(parted, noise, one)).all()


# ---- what a call is told


@retaining
def test_rows_are_the_frames_whose_latents_the_host_put_there(clip):
    _, _, noise, _ = clip
    seen = []

    class Look:
        def __call__(self, query, key, value, options, **_):
            seen.append(host.call_of(options))
            return host.run_attention(options, None, query, key, value)

    patched = clip[0].clone()
    host.observe(patched)
    host.replace_attention(patched, "attn2", host.cross_attention_layers(patched)[:1], lambda earlier: Look())
    sample(windows(patched, context_length=3, context_overlap=1, causal_window_fix=True), noise)
    assert [call.frames.shown for call in seen[:2]] == [(0, 1, 2), (0, 1, 2, 3)]
    assert [(call.pictures, call.clip) for call in seen[:2]] == [(3, 4), (4, 4)]
    seen.clear()
    sample(windows(patched, latent_retain_index_list="0"), noise)
    assert [call.frames.shown for call in seen[:2]] == [(0, 1), (0, 3)]
    seen.clear()
    sample(patched, noise)
    assert seen[0].frames is host.EVERY and seen[0].clip == 4
    seen.clear()
    texts = [[torch.cat([tiny_models.prompt(i)[0][0] for i in range(FRAMES)]), {}]]  # a text for every frame
    harness.sample(windows(patched), noise, texts, steps=3)
    assert len(seen[0].run.prompts) == 3  # one for each window, over all steps, and the negative one


def test_a_window_of_an_earlier_call_does_not_count():
    window = SimpleNamespace(dim=0, index_list=[2, 3], total_frames=4)
    options = {"context_handler": SimpleNamespace(), "transformer_options": {"context_window": window}}
    assert frames.shown_frames(options, torch.zeros(2, 4, 8, 8)) == host.Frames((2, 3), 4)
    assert frames.shown_frames(options, torch.zeros(1, 4, 8, 8)) is host.EVERY
    assert frames.shown_frames({"transformer_options": {"context_window": window}}, torch.zeros(2, 4)) is host.EVERY
