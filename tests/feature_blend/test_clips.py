"""Feature Blend on clips of Wan: the source's features and latents of every frame, and a mask for each."""

import pytest
import tiny_models
import torch
from harness import assert_acts, assert_close
from palimpsest.nodes.feature_blend.layers import FeatureLayer
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.kv.nodes import TuneKV
from tiny_transformers import latent, own_run, prompt, sample

FRAMES, STEPS = 3, 3
SERVED = ["wan", "wan22"]
FEATURES_ALONE = {"blend_latents_until": 0.0}
HALF = 4  # cells of the latent, of 8

pytestmark = pytest.mark.usefixtures("inference")


def blend(model, trajectory, family, **settings):
    """(the model that blends, the report)."""
    return tiny_models.execute(
        FeatureBlend, model=model, trajectory=trajectory, **{"positive": prompt(family, 1)} | settings
    )


def drawn(model, family, text=3, frames=FRAMES, pictures=1, tokens=9, **settings):
    given = {"steps": STEPS, "cfg": 1.0, "seed": 1} | settings
    empty = latent(family, pictures, frames=frames)
    return sample(model, prompt(family, text, tokens), prompt(family, 2), empty, **given)


def left(masks=1):
    """A MASK in pixels, white on the left half."""
    mask = torch.zeros(masks, 96, 64)
    mask[..., :32] = 1
    return mask


def moving(masks):
    """A mask for each frame of the latent: left, right, nowhere; for 9 of the video the same, four frames each."""
    mask = torch.cat([left(), left().flip(2), torch.zeros(1, 96, 64)])
    return mask if masks == FRAMES else mask[[0] + 4 * [1] + 4 * [2]]


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("where", ["cached", "same step"])
def test_outside_of_a_mask_every_frame_is_the_source_bit_for_bit_and_inside_it_is_not(models, family, where):
    model = models(family)
    trajectory, plain = own_run(model, family, frames=FRAMES)
    assert trajectory.frames == FRAMES and plain.shape[2] == FRAMES
    patched, report = blend(model, trajectory, family, mask=left(), source_features=where, **FEATURES_ALONE)
    found, edit = drawn(patched, family), drawn(model, family)
    assert torch.equal(found[..., HALF:], plain[..., HALF:])
    for frame in range(FRAMES):
        assert_acts(found[:, :, frame, :, :HALF], plain[:, :, frame, :, :HALF])
    assert "blends double 1" in report
    black, white = torch.zeros(1, 96, 64), torch.ones(1, 96, 64)
    nowhere, everywhere = (blend(model, trajectory, family, mask=mask, **FEATURES_ALONE)[0] for mask in (black, white))
    assert torch.equal(drawn(nowhere, family), plain)
    assert torch.equal(drawn(everywhere, family), edit)
    assert torch.equal(drawn(model, family), edit)


@pytest.mark.parametrize("masks", [FRAMES, 9], ids=["of the latent", "of the video"])
def test_each_frame_has_its_own_mask(models, masks):
    model = models("wan")
    trajectory, plain = own_run(model, "wan", frames=FRAMES)
    found = drawn(blend(model, trajectory, "wan", mask=moving(masks), **FEATURES_ALONE)[0], "wan")
    assert torch.equal(found[:, :, 0, :, HALF:], plain[:, :, 0, :, HALF:])
    assert torch.equal(found[:, :, 1, :, :HALF], plain[:, :, 1, :, :HALF])
    assert torch.equal(found[:, :, 2], plain[:, :, 2])
    assert_acts(found[:, :, 0, :, :HALF], plain[:, :, 0, :, :HALF])
    assert_acts(found[:, :, 1, :, HALF:], plain[:, :, 1, :, HALF:])


def test_a_feature_is_the_written_out_mix_of_both_runs_at_the_first_step(models):
    """F = w F_edit + (1 - w) F_source of the last block, by hooks on it in three runs of one step."""
    model, seen = models("wan"), []
    trajectory, _ = own_run(model, "wan", frames=FRAMES, steps=1)
    block = model.model.diffusion_model.blocks[-1]
    head = model.model.diffusion_model.head

    def looked(module, run, of):
        hook = module.register_forward_hook(lambda _, args, out: seen.append(of(args, out)))
        try:
            run()
        finally:
            hook.remove()
        return seen.pop()

    def output(args, out):
        return out.clone()

    edit = looked(block, lambda: drawn(model, "wan", steps=1), output)
    source = looked(block, lambda: drawn(model, "wan", text=1, steps=1), output)
    soft = 0.25 * moving(FRAMES)
    given = {"mask": soft, "layers": "out", "alpha_inside": 0.8, "alpha_outside": 0.1, **FEATURES_ALONE}
    patched = blend(model, trajectory, "wan", source_features="cached", **given)[0]
    found = looked(head, lambda: drawn(patched, "wan", steps=1), lambda args, out: args[0].clone())
    places = torch.nn.functional.adaptive_avg_pool2d(soft[:, None], (6, 4)).flatten()[None, :, None]
    weight = 0.1 + 0.7 * places
    torch.testing.assert_close(found, weight * edit + (1 - weight) * source, rtol=1e-5, atol=1e-5)


def test_recorded_and_beside_every_step_are_alike_guided_and_in_batches_of_clips(models):
    model, found = models("wan"), []
    trajectory, _ = own_run(model, "wan", pictures=2, frames=2)
    given = {"cfg": 3.0, "pictures": 2, "tokens": 12, "frames": 2}
    for where in ("cached", "same step"):
        settings = {"mask": moving(FRAMES)[:2], "alpha_inside": 0.7, "source_features": where, **FEATURES_ALONE}
        found.append(drawn(blend(model, trajectory, "wan", **settings)[0], "wan", **given))
    assert_close(*found)
    assert_acts(found[0], drawn(model, "wan", **given))


@pytest.mark.parametrize("mask", [left(), moving(FRAMES)], ids=["one", "for each frame"])
def test_held_latents_leave_the_source_outside(models, mask):
    model = models("wan")
    trajectory, plain = own_run(model, "wan", frames=FRAMES)
    alone = {"alpha_outside": 1.0, "blend_latents_until": 1.0}
    found = drawn(blend(model, trajectory, "wan", mask=mask, **alone)[0], "wan")
    outside = torch.nn.functional.interpolate(mask[:, None], (12, 8))[:, 0].expand(FRAMES, -1, -1) == 0
    assert_close(found[..., outside], plain[..., outside], 1e-5)
    assert_acts(found[..., ~outside], plain[..., ~outside])


def test_off_the_sources_path_features_act_no_more(models, caplog):
    """From other noise than the source's: a latent is off the path where the mean over all frames of a region is."""
    model = models("wan")
    trajectory, _ = own_run(model, "wan", frames=FRAMES)
    patched, _ = blend(model, trajectory, "wan", mask=moving(FRAMES), **FEATURES_ALONE)
    assert torch.equal(drawn(patched, "wan", seed=9), drawn(model, "wan", seed=9))
    assert "the latent is not on the source's path" in caplog.text


def test_memory_grows_with_the_frames_and_is_said(models):
    model, told = models("wan"), []
    for frames in (1, FRAMES):
        trajectory, _ = own_run(model, "wan", frames=frames)
        told.append(blend(model, trajectory, "wan", mask=left(), layers="out", source_features="cached")[0])
    sources = [
        next(w for named in each.wrappers["predict_noise"].values() for w in named if hasattr(w, "source")).source
        for each in told
    ]
    latent_frames, height, width = 1 + 80 // 4, 480 // 8, 832 // 8  # 81 frames at 832 x 480
    sizes = [latent_frames * FeatureLayer("double", 0, dim, 1).elements(height, width) * 2 for dim in (5120, 1536)]
    assert [round(size / 1e6) for size in sizes] == [335, 101]  # as the help page has them
    assert sources[1].bytes == FRAMES * sources[0].bytes == FRAMES * STEPS * 128 * 6 * 4 * 4


def test_what_is_refused(models):
    model = models("wan")
    clip, _ = own_run(model, "wan", frames=FRAMES)
    still, _ = own_run(model, "wan")
    with pytest.raises(ValueError, match=r"mask has 5 pictures, the video 9 frames \(3 in its latent\)"):
        blend(model, clip, "wan", mask=left(5))
    for trajectory, frames in ((clip, 2), (still, FRAMES)):
        patched = blend(model, trajectory, "wan", mask=left(), **FEATURES_ALONE)[0]
        match = rf"recorded for a latent of {trajectory.frames} frames, the sampled one has {frames}: .* the whole clip"
        with pytest.raises(ValueError, match=match):
            drawn(patched, "wan", frames=frames)
    given = {"model": model, "trajectory": clip, "positive": prompt("wan", 1)}
    with pytest.raises(ValueError, match="a clip of 3 latent frames, Tune KV looks at a picture"):
        tiny_models.execute(TuneKV, **given, inner_steps=0)
