"""Video Attention in the host: the equation, identity, inversion, and other patches beside it."""

import comfy.model_management
import comfy.samplers
import harness
import pytest
import tiny_models
import torch
from comfy_extras import nodes_hypertile, nodes_pag, nodes_sag, nodes_tomesd
from harness import acts
from palimpsest.kernels.kv_inversion import attention
from palimpsest.nodes import host
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from palimpsest.nodes.video import attention as video_attention
from palimpsest.nodes.video.nodes import VideoAttention

STEPS, GUIDANCE, FRAMES = 3, 3.0, 3
families = pytest.mark.parametrize("family", ["sd15", "sdxl"])

pytestmark = pytest.mark.usefixtures("inference")


def video(model, **settings):
    return tiny_models.execute(VideoAttention, model=model, **settings)[0]


def sample(model, latent, family="sd15", cfg=GUIDANCE, positive=None, sampler="euler"):
    positive, negative = positive or tiny_models.prompt(1, family=family), tiny_models.prompt(2, family=family)
    added = harness.noise(*latent.shape[2:], pictures=len(latent), seed=5)
    return harness.sample_noise(model, added, positive, negative, steps=STEPS, cfg=cfg, sampler=sampler)


def clip(frames=FRAMES, height=8, width=8):
    return tiny_models.latent(frames, height, width)["samples"]


# ---- identity


@families
@pytest.mark.parametrize("look_at", video_attention.FRAMES)
def test_a_single_picture_is_the_plain_models_bit_for_bit(family, look_at):
    model, latent = tiny_models.unet(family), clip(1)
    assert torch.equal(sample(video(model, look_at=look_at), latent, family), sample(model, latent, family))


@families
def test_at_strength_0_a_clip_is_the_plain_models_and_the_model_stays_itself(family):
    model, latent = tiny_models.unet(family), clip()
    plain = sample(model, latent, family)
    assert torch.equal(sample(video(model, strength=0.0), latent, family), plain)
    assert acts(sample(video(model), latent, family), plain)
    assert torch.equal(sample(model, latent, family), plain)


def test_outside_of_its_span_nothing_changes():
    model, latent = tiny_models.unet(), clip()
    plain = sample(model, latent)
    assert torch.equal(sample(video(model, start_percent=0.6, end_percent=0.7), latent), plain)
    assert acts(sample(video(model, end_percent=0.5), latent), plain)
    for start, end in ((0.5, 0.2), (0.5, 0.5)):
        with pytest.raises(ValueError, match="leave no step between them"):
            video(model, start_percent=start, end_percent=end)


# ---- the equation


def spied(model, **settings):
    """What the first layer is given and gives: (query, key, value, out, heads) a call."""
    layer, seen = host.self_attention_layers(model)[0], []
    ours = video(model, **settings).model_options["transformer_options"]["patches_replace"]["attn1"][layer.key[:2]]

    def spy(query, key, value, options):
        out = ours(query, key, value, options)
        if host.layer_key(options) == layer.key:
            seen.append((query, key, value, out, options["n_heads"]))
        return out

    patched = model.clone()
    patched.set_model_attn1_replace(spy, *layer.key[:2])
    return patched, seen


@families
@pytest.mark.parametrize("cfg", [1.0, GUIDANCE])
def test_a_layer_does_what_the_paper_says(family, cfg):
    """Each frame's queries on the keys and values of the first frame and the one before, prompt by prompt."""
    model, latent = tiny_models.unet(family), clip()
    patched, seen = spied(model, look_at="first and previous")
    sample(patched, latent, family, cfg)
    query, key, value, out, heads = seen[0]
    assert len(query) == FRAMES * (1 if cfg == 1.0 else 2)
    for row in range(len(query)):
        first = row - row % FRAMES
        rows = [first, max(row - 1, first)]
        k, v = (torch.cat([t[r] for r in rows])[None].double() for t in (key, value))
        expected = attention(query[row : row + 1].double(), k, v, heads)
        torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_first_frame_is_drawn_as_if_it_were_alone():
    model, latent = tiny_models.unet(), clip()
    alone = sample(model, latent)[:1]  # the noise of a batch begins alike
    torch.testing.assert_close(
        sample(video(model, look_at="first and previous"), latent)[:1], alone, rtol=1e-4, atol=1e-5
    )


def test_equal_frames_stay_equal_and_are_the_plain_models():
    model = tiny_models.unet()
    noise = harness.noise().expand(4, -1, -1, -1).contiguous()
    both = tiny_models.prompt(1), tiny_models.prompt(2)
    found = harness.sample_noise(video(model, look_at="all"), noise, *both, steps=STEPS)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-4, atol=1e-5)


def test_strength_lies_between_the_two():
    model, latent = tiny_models.unet(), clip()
    plain, full = sample(model, latent), sample(video(model), latent)
    half = sample(video(model, strength=0.5), latent)
    assert (half - plain).norm() < (full - plain).norm()
    assert (half - full).norm() < (full - plain).norm()


@families
def test_attention_over_time_is_that_of_each_place_over_the_frames(family):
    model, latent = tiny_models.unet(family), clip()
    patched, seen = spied(model, strength=0.0, temporal=1.0)
    sample(patched, latent, family)
    query, key, value, out, heads = seen[0]
    for first in (0, FRAMES):
        for place in (0, 5, query.shape[1] - 1):
            q, k, v = (t[first : first + FRAMES, place][None].double() for t in (query, key, value))
            expected = attention(q, k, v, heads)[0]
            torch.testing.assert_close(out[first : first + FRAMES, place].double(), expected, rtol=1e-4, atol=1e-5)


def test_temporal_mixes_both_and_alone_it_changes_the_clip():
    model, latent = tiny_models.unet(), clip()
    plain, frames, time = (
        sample(video(model, **settings), latent)
        for settings in ({"strength": 0.0}, {}, {"strength": 0.0, "temporal": 0.5})
    )
    assert acts(time, plain)
    assert acts(sample(video(model, temporal=0.5), latent), frames)
    assert torch.equal(sample(video(model, temporal=0.5), clip(1)), sample(model, clip(1)))
    tiled = tiny_models.execute(nodes_hypertile.HyperTile, model=model, tile_size=32, swap_size=2, max_depth=0)[0]
    with pytest.raises(ValueError, match="set temporal to 0"):
        sample(video(tiled, temporal=0.5), latent)


@pytest.mark.parametrize("look_at", ["first and previous", "all"])
def test_clips_of_one_batch_do_not_see_each_other(look_at):
    model, latent = tiny_models.unet(), clip(4)
    settings = {"look_at": look_at, "temporal": 0.3}
    together = sample(video(model, clip_length=2, **settings), latent)
    alone = sample(video(model, **settings), latent[:2])  # the noise of a batch begins alike
    torch.testing.assert_close(together[:2], alone, rtol=1e-4, atol=1e-5)
    assert acts(together, sample(video(model, **settings), latent))
    assert torch.equal(sample(video(model, clip_length=1), latent), sample(model, latent))
    with pytest.raises(ValueError, match="no whole number of clips of 3 frames"):
        sample(video(model, clip_length=3), latent)


def test_cancelling_leaves_nothing_behind():
    model, latent = tiny_models.unet(), clip()
    patched = video(model, end_percent=0.9)
    before, kept = sample(patched, latent), set(patched.model_options["transformer_options"])
    broken = patched.clone()

    def stop(args):
        raise comfy.model_management.InterruptProcessingException

    broken.set_model_sampler_post_cfg_function(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(broken, latent)
    assert set(broken.model_options["transformer_options"]) == kept
    assert torch.equal(sample(patched, latent), before)


@pytest.mark.parametrize("layers", host.SELF_ATTENTION)
def test_every_choice_of_layers_acts_where_the_model_has_them(layers):
    model, latent = tiny_models.unet("sdxl-deep"), clip(2)
    assert acts(sample(video(model, layers=layers), latent, "sdxl"), sample(model, latent, "sdxl"))


def test_odd_sizes_and_areas():
    model, latent = tiny_models.unet(), clip(3, 11, 9)
    assert acts(sample(video(model), latent), sample(model, latent))
    tensor, extra = tiny_models.prompt(4)[0]
    area = [*tiny_models.prompt(1), [tensor, extra | {"area": (6, 4, 2, 2), "strength": 1.0}]]
    assert acts(sample(video(model), latent, positive=area), sample(model, latent, positive=area))


# ---- beside other things


def still_clip(frames=4):
    """Frames that differ a little, as those of a clip."""
    base = tiny_models.latent(1, seed=3)["samples"].expand(frames, -1, -1, -1)
    return {"samples": base + 0.05 * tiny_models.latent(frames, seed=4)["samples"]}


@families
def test_inversion_with_the_same_model_rebuilds_the_clip_better(family):
    model, latent = tiny_models.unet(family, "V_PREDICTION"), still_clip()
    prompt = tiny_models.prompt(1, family=family)

    def rebuilt(inverting, sampling):
        inputs = {"latent": latent, "positive": prompt, "steps": 20, "reconstruction_guidance": 0.0}
        noise = tiny_models.execute(Invert, model=inverting, **inputs)[1]["samples"]
        sampler = comfy.samplers.KSampler(sampling, 20, torch.device("cpu"), "euler", "normal")
        found = sampler.sample(
            torch.zeros_like(noise), prompt, prompt, 1.0, latent_image=noise, disable_pbar=True, seed=1
        )
        return float((found - latent["samples"]).norm())

    patched = video(model, look_at="first and previous")
    assert rebuilt(patched, patched) < rebuilt(model, patched)


@pytest.mark.parametrize("mode", ["extend", "frozen"])
def test_with_kv_inversion_in_either_order_both_act(mode):
    model, latent = tiny_models.unet(), still_clip(2)
    positive, negative = tiny_models.prompt(1), tiny_models.prompt(2)
    trajectory, noise, *_ = tiny_models.execute(
        Invert, model=model, latent=latent, positive=positive, steps=STEPS, reconstruction_guidance=0.0
    )
    kv = tiny_models.execute(
        TuneKV, model=model, trajectory=trajectory, positive=positive, negative=negative, guidance=GUIDANCE,
        inner_steps=2, layers="all",
    )[0]  # fmt: skip

    def apply(model):
        return tiny_models.execute(ApplyKV, model=model, kv=kv, mode=mode, source_guidance=1.0)[0]

    latent = noise["samples"]
    alone, ours = sample(apply(model), latent), sample(video(model), latent)
    both = sample(apply(video(model)), latent), sample(video(apply(model)), latent)
    assert all(acts(found, ours) for found in both)
    if mode == "extend":  # frozen replaces every key, so that nothing is left of the frames'
        assert all(acts(found, alone) for found in both)


def test_kv_inversion_in_mode_recompute_behind_it_is_refused_with_a_way_out():
    model, latent = tiny_models.unet(), still_clip(2)
    positive = tiny_models.prompt(1)
    trajectory, noise, *_ = tiny_models.execute(
        Invert, model=model, latent=latent, positive=positive, steps=STEPS, reconstruction_guidance=0.0
    )
    kv = tiny_models.execute(
        TuneKV, model=model, trajectory=trajectory, positive=positive, negative=tiny_models.prompt(2),
        guidance=GUIDANCE, inner_steps=1,
    )[0]  # fmt: skip
    applied = tiny_models.execute(ApplyKV, model=model, kv=kv, mode="recompute", source_guidance=1.0)[0]
    with pytest.raises(ValueError, match="choose mode extend"):
        sample(video(applied), noise["samples"])


def test_tuning_may_run_through_it():
    """Keys are gathered inside of a gradient; recompute tunes the layer's own tokens and comes first in the chain."""
    model, latent = video(tiny_models.unet(), look_at="first"), still_clip(2)
    trajectory = tiny_models.execute(
        Invert, model=model, latent=latent, positive=tiny_models.prompt(1), steps=2, reconstruction_guidance=0.0
    )[0]
    kv = tiny_models.execute(
        TuneKV, model=model, trajectory=trajectory, positive=tiny_models.prompt(1), negative=tiny_models.prompt(2),
        guidance=GUIDANCE, inner_steps=2,
    )[0]  # fmt: skip
    assert kv.pictures == 2


@pytest.mark.parametrize(
    ("node", "settings"),
    [
        (nodes_hypertile.HyperTile, {"tile_size": 32, "swap_size": 2, "max_depth": 0}),
        (nodes_tomesd.TomePatchModel, {"ratio": 0.5}),
        (nodes_pag.PerturbedAttentionGuidance, {}),
    ],
)
@pytest.mark.parametrize("theirs_last", [True, False])
def test_the_hosts_attention_nodes_act_beside_it(node, settings, theirs_last):
    model, latent = tiny_models.unet(), clip()

    def theirs(model):
        return tiny_models.execute(node, model=model, **settings)[0]

    patched = theirs(video(model)) if theirs_last else video(theirs(model))
    torch.manual_seed(0)
    both = sample(patched, latent)
    torch.manual_seed(0)
    assert acts(both, sample(theirs(model), latent))
    assert acts(both, sample(video(model), latent))


def test_a_node_of_the_host_that_wants_as_many_keys_as_queries_is_refused():
    theirs = tiny_models.execute(nodes_sag.SelfAttentionGuidance, model=tiny_models.unet())[0]
    with pytest.raises(ValueError, match="put that node after this one"):
        video(theirs)
    video(theirs, look_at="first")


def test_other_models_are_refused_by_name():
    class Other:
        class model:
            diffusion_model = torch.nn.Identity()

    with pytest.raises(ValueError, match="Video Attention works inside the attention of U-Net models"):
        video(Other())
