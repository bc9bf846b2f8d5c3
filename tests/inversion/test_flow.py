"""Flow-matching models in the host: the way up and down, noise as NOISE, FlowEdit, and what is refused."""

import logging

import comfy.samplers
import pytest
import tiny_models
import tiny_transformers as transformers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler, nodes_model_advanced
from harness import assert_acts, assert_close, half
from palimpsest.nodes.inversion.flow_edit import FlowEditSettings, weights
from palimpsest.nodes.inversion.flow_nodes import FlowEdit, FlowSampler
from palimpsest.nodes.inversion.nodes import Invert

STEPS = 12

pytestmark = pytest.mark.usefixtures("inference")


def picture(family, pictures=1, frames=None, seed=3):
    """A smooth random latent of a family's kind."""
    empty = transformers.latent(family, pictures)
    empty = empty if frames is None else empty.expand(-1, -1, frames, -1, -1)
    coarse = torch.randn(empty[..., 0, 0].numel(), 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=empty.shape[-2:], mode="bicubic") * 2
    return smooth.reshape(empty.shape)


def invert(model, latent, family, **changes):
    given = {"positive": transformers.prompt(family, 1), "steps": STEPS, "scheduler": "simple"} | changes
    return tiny_models.execute(Invert, model=model, latent={"samples": latent}, **given)


def schedule(model, steps=STEPS):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


class Seeded:
    """The host's RandomNoise."""

    def __init__(self, seed=5):
        self.seed = seed

    def generate_noise(self, latent):
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(latent["samples"].shape, generator=generator)


def sampled(model, noise, sampler, latent, positive, negative=None, *, cfg=1.0, sigmas=None):
    """SamplerCustomAdvanced with a CFGGuider."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive if negative is None else negative)
    guider.set_cfg(cfg)
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    sigmas = schedule(model) if sigmas is None else sigmas
    latent = latent if isinstance(latent, dict) else {"samples": latent}
    return nodes_custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]


def away(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


# ---- up and down


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen", "zimage"])
def test_the_hosts_euler_rebuilds_the_picture_from_the_inverted_noise(family):
    model, latent = transformers.model(family), picture(family)
    trajectory, noise, rebuilt, report, found = invert(model, latent, family)
    again = sampled(model, found, "euler", noise, transformers.prompt(family, 1))
    assert_close(again, rebuilt["samples"])
    plain = invert(model, latent, family, flow_method="Euler")[2]["samples"]
    assert away(again, latent) < 0.75 * away(plain, latent)
    assert trajectory.flow
    assert trajectory.latents.shape == (STEPS + 1, 1, 16, *latent.shape[-2:])
    assert noise["samples"].shape == rebuilt["samples"].shape == latent.shape
    assert "SamplerCustomAdvanced, inverted_noise, sampler euler" in report


def test_fireflow_goes_down_by_its_own_sampler():
    model, latent = transformers.model("sd3"), picture("sd3")
    _, noise, rebuilt, report, found = invert(model, latent, "sd3", flow_method="FireFlow")
    (sampler,) = tiny_models.execute(FlowSampler)
    again = sampled(model, found, sampler, noise, transformers.prompt("sd3", 1))
    assert_close(again, rebuilt["samples"])
    by_euler = sampled(model, found, "euler", noise, transformers.prompt("sd3", 1))
    assert away(again, latent) < 0.1 * away(by_euler, latent)
    assert "Flow Inversion Sampler (FireFlow)" in report


@pytest.mark.parametrize(("method", "calls"), [("Uni-Inv", STEPS + 1), ("FireFlow", STEPS + 1), ("Euler", STEPS)])
def test_a_picture_costs_one_row_and_at_most_one_call_more_than_steps(method, calls):
    model, rows = transformers.model("sd3"), []

    def count(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    invert(model, picture("sd3"), "sd3", flow_method=method, reconstruction_guidance=0.0)
    assert rows == [1] * calls


@pytest.mark.parametrize("latent", ["empty", "picture", "noise"])
@pytest.mark.parametrize("first", [0, 4])
def test_the_run_begins_in_the_inverted_noise_whatever_latent_it_is_given(latent, first):
    """Also where a part of the schedule was inverted, at whose noisiest level the latent counts."""
    model, source = transformers.model("flux"), picture("flux")
    sigmas = schedule(model)[first:]
    trajectory, noise, rebuilt, _, found = invert(model, source, "flux", sigmas=sigmas)
    given = {"empty": torch.zeros_like(source), "picture": source, "noise": noise["samples"]}[latent]
    seen = []

    def see(executor, x, *args, **kwargs):
        seen.append(x.clone())
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "see", see)
    again = sampled(model, found, "euler", given, transformers.prompt("flux", 1), sigmas=sigmas)
    assert_close(seen[0], trajectory.latents[0], 1e-5)
    assert_close(again, rebuilt["samples"])


def test_a_part_of_the_schedule_may_start_from_the_latent_as_well():
    model, source = transformers.model("flux"), picture("flux")
    sigmas = schedule(model)[4:]
    _, noise, rebuilt, _, _ = invert(model, source, "flux", sigmas=sigmas)
    disabled = nodes_custom_sampler.DisableNoise.execute().args[0]
    assert_close(
        sampled(model, disabled, "euler", noise, transformers.prompt("flux", 1), sigmas=sigmas), rebuilt["samples"]
    )


def test_noise_of_another_size_is_refused():
    *_, found = invert(transformers.model("sd3"), picture("sd3"), "sd3", reconstruction_guidance=0.0)
    with pytest.raises(ValueError, match="the inverted noise is for latents of shape"):
        found.generate_noise({"samples": torch.zeros(1, 16, 4, 4)})
    assert found.generate_noise({"samples": torch.zeros(3, 16, 12, 8)}).shape == (3, 16, 12, 8)


@pytest.mark.parametrize(
    ("node", "given"),
    [("ModelSamplingSD3", (5.0,)), ("ModelSamplingAuraFlow", (1.73,)), ("ModelSamplingFlux", (2.0, 0.5, 1024, 1024))],
)
def test_a_shift_of_the_schedule_counts(node, given):
    model = transformers.model("flux")
    shifting = getattr(nodes_model_advanced, node)()
    shifted = getattr(shifting, "patch_aura", shifting.patch)(model, *given)[0]
    trajectory, *_ = invert(shifted, picture("flux"), "flux", reconstruction_guidance=0.0)
    assert trajectory.sigmas == tuple(schedule(shifted).tolist())
    assert trajectory.sigmas != tuple(schedule(model).tolist())


def test_pooled_vector_and_guidance_input_reach_the_model_on_both_ways():
    """Flux.1 dev reads both in every block."""
    model, seen = transformers.model("flux"), []
    prompt = transformers.prompt("flux", 1, guidance=1.5)

    def see(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        seen.append((float(kwargs["guidance"]), kwargs["y"].clone()))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "see", see)
    invert(model, picture("flux"), "flux", positive=prompt)
    assert len(seen) == 2 * STEPS + 1
    assert all(guidance == 1.5 and torch.equal(y, prompt[0][1]["pooled_output"]) for guidance, y in seen)


def test_a_models_own_patches_stay_and_the_model_is_as_it_was():
    model, latent = transformers.model("sd3"), picture("sd3")
    negative = transformers.prompt("sd3", 2)
    before = sampled(
        model, Seeded(), "euler", torch.zeros_like(latent), transformers.prompt("sd3", 1), negative, cfg=3.0
    )
    _, noise, *_, found = invert(model, latent, "sd3", guidance=2.0, negative=negative)
    sampled(model, found, tiny_models.execute(FlowSampler)[0], noise, transformers.prompt("sd3", 3))
    after = sampled(
        model, Seeded(), "euler", torch.zeros_like(latent), transformers.prompt("sd3", 1), negative, cfg=3.0
    )
    assert torch.equal(before, after)


def test_noise_of_a_diffusion_model_begins_where_its_latent_does():
    """KSampler Advanced without noise and SamplerCustomAdvanced with inverted_noise draw the same picture."""
    model, latent = tiny_models.unet(), tiny_models.latent()["samples"]
    trajectory, noise, *_, found = invert(model, latent, "sd3", positive=tiny_models.prompt(1), scheduler="normal")
    sigmas = torch.tensor(trajectory.sigmas)
    disabled = nodes_custom_sampler.DisableNoise.execute().args[0]
    wanted = sampled(model, disabled, "euler", noise, tiny_models.prompt(3), sigmas=sigmas)
    for given in (latent, torch.zeros_like(latent), noise):
        assert_close(sampled(model, found, "euler", given, tiny_models.prompt(3), sigmas=sigmas), wanted)


# ---- exact rows


def test_the_sources_rows_follow_its_trajectory_to_the_bit():
    model, latent = transformers.model("sd3"), picture("sd3")
    trajectory, *_, found = invert(model, latent, "sd3", flow_method="Euler", reconstruction_guidance=0.0)
    edit = [
        [torch.cat([transformers.prompt("sd3", seed)[0][0] for seed in (1, 3)]), transformers.prompt("sd3", 1)[0][1]]
    ]
    two = torch.zeros(2, *latent.shape[1:])
    plain = sampled(model, found, tiny_models.execute(FlowSampler, method="Euler")[0], two, edit)
    held = tiny_models.execute(FlowSampler, method="Euler", trajectory=trajectory, source_rows=1)[0]
    exact = sampled(model, found, held, two, edit)
    assert_close(exact[:1], latent, 1e-6)
    assert away(plain[:1], latent) > 1e-3
    assert torch.equal(exact[1:], plain[1:])
    with pytest.raises(ValueError, match="source_rows is 3, the sampled batch has 2"):
        sampled(model, found, tiny_models.execute(FlowSampler, trajectory=trajectory, source_rows=3)[0], two, edit)


def test_the_way_down_does_not_climb():
    model = transformers.model("sd3")
    sigmas = torch.flip(schedule(model), (0,))
    with pytest.raises(ValueError, match="the noise levels must fall"):
        sampled(model, Seeded(), tiny_models.execute(FlowSampler)[0], picture("sd3"), [], sigmas=sigmas)


# ---- FlowEdit


def flow_edit(family, latent, *, model=None, target=3, cfg=3.0, seed=5, sigmas=None, **settings):
    """The node's sampler from a picture towards another prompt."""
    model = transformers.model(family) if model is None else model
    source, negative = transformers.prompt(family, 1), transformers.prompt(family, 2)
    chosen = {"source_guidance": 3.0, "start_percent": 0.0} | settings
    (sampler,) = tiny_models.execute(FlowEdit, source=source, source_negative=negative, **chosen)
    prompt = transformers.prompt(family, target)
    return sampled(model, Seeded(seed), sampler, latent, prompt, negative, cfg=cfg, sigmas=sigmas)


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen", "zimage"])
def test_equal_prompts_give_the_picture_back(family):
    latent = picture(family)
    assert_close(flow_edit(family, latent, target=1), latent, 1e-5)
    assert_acts(flow_edit(family, latent), latent, 1e-2)


def test_outside_of_the_mask_the_picture_stays():
    latent, mask = picture("sd3"), half(96, 64)
    whole = flow_edit("sd3", latent)
    for edited in (
        flow_edit("sd3", latent, mask=mask),
        flow_edit("sd3", {"samples": latent, "noise_mask": mask}),
        flow_edit("sd3", latent, mask=mask, end_percent=0.6),
        flow_edit("sd3", latent, mask=mask, averages=2, start_percent=0.3),
    ):
        assert_close(edited[..., 4:], latent[..., 4:], 1e-5)
        assert_acts(edited[..., :4], latent[..., :4], 1e-2)
    assert_acts(whole[..., 4:], latent[..., 4:], 1e-2)


def test_every_setting_acts():
    latent = picture("sd3")
    base = flow_edit("sd3", latent)
    for changes in (
        {"seed": 6}, {"averages": 2}, {"start_percent": 0.4}, {"end_percent": 0.6}, {"source_guidance": 1.0},
        {"cfg": 5.0},
    ):  # fmt: skip
        assert_acts(flow_edit("sd3", latent, **changes), base)
    assert torch.equal(flow_edit("sd3", latent), base)


def test_a_later_start_stays_nearer_to_the_picture():
    latent = picture("sd3")
    moved = [away(flow_edit("sd3", latent, start_percent=start), latent) for start in (0.0, 0.4, 0.8)]
    assert moved == sorted(moved, reverse=True)


def test_steps_before_the_start_cost_nothing():
    model, rows = transformers.model("sd3"), []

    def count(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    flow_edit("sd3", picture("sd3"), model=model, start_percent=0.5)
    at = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    assert rows == [2, 2] * sum(0 < level <= at for level in schedule(model).tolist())


def test_a_mask_of_the_picture_is_cut_as_the_picture_and_one_of_other_proportions_is_said(caplog):
    clean, mask = picture("sd3"), torch.rand(1, 99, 71)  # 96 x 64 pixels are left of it, from the middle
    assert torch.equal(weights(mask, None, clean), weights(mask[:, 1:97, 3:67], None, clean))
    with caplog.at_level(logging.WARNING):
        flow_edit("sd3", clean, mask=mask)
        assert "proportions" not in caplog.text
        flow_edit("sd3", clean, mask=half(64, 128))
    assert caplog.text.count("other proportions") == 1


def test_a_clip_is_edited_whole_and_its_mask_may_change_from_frame_to_frame():
    clip = picture("qwen", frames=2)
    masks = torch.cat([torch.zeros(1, 96, 64), torch.ones(1, 96, 64)])
    edited = flow_edit("qwen", clip, mask=masks)
    assert_close(edited[:, :, 0], clip[:, :, 0], 1e-5)
    assert_acts(edited[:, :, 1], clip[:, :, 1], 1e-2)


def test_each_picture_of_a_batch_has_its_own_mask_where_latents_have_frames():
    batch = picture("qwen", pictures=2)
    masks = torch.cat([half(96, 64), 1 - half(96, 64)])
    edited = flow_edit("qwen", batch, mask=masks)
    for i, black in enumerate((slice(4, None), slice(4))):
        assert_close(edited[i, ..., black], batch[i, ..., black], 1e-5)
    assert_acts(edited[0, ..., :4], batch[0, ..., :4], 1e-2)
    assert_acts(edited[1, ..., 4:], batch[1, ..., 4:], 1e-2)


def test_every_input_of_flow_edit_arrives_in_the_field_of_its_name():
    given = {"source_guidance": 1.5, "start_percent": 0.1, "end_percent": 0.9, "averages": 3}
    prompts = transformers.prompt("sd3", 1), transformers.prompt("sd3", 2)
    (sampler,) = tiny_models.execute(FlowEdit, source=prompts[0], source_negative=prompts[1], mask=half(), **given)
    editing = sampler.sampler_function
    assert editing.settings == FlowEditSettings(**given)
    assert (editing.source.guidance, editing.mask.shape) == (1.5, (1, 64, 64))
    assert torch.equal(editing.source.positive[0][0], prompts[0][0][0])
    assert torch.equal(editing.source.negative[0][0], prompts[1][0][0])


# ---- what is refused or said


def test_flow_edit_refuses_what_it_cannot_edit_with_a_way_out():
    latent = picture("sd3")
    unet = tiny_models.unet()
    (sampler,) = tiny_models.execute(FlowEdit, source=tiny_models.prompt(1), source_guidance=1.0)
    with pytest.raises(ValueError, match=r"a diffusion model: use Invert Picture"):
        sampled(unet, Seeded(), sampler, tiny_models.latent(), tiny_models.prompt(3))
    with pytest.raises(ValueError, match="latent_image is empty: connect VAE Encode"):
        flow_edit("sd3", torch.zeros_like(latent))
    with pytest.raises(ValueError, match="noise levels that fall to 0"):
        flow_edit("sd3", latent, sigmas=torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match=r"go up to 14\.6.*from 1 to 0: connect a scheduler that is given this model"):
        flow_edit("sd3", latent, sigmas=torch.tensor([14.6, 5.0, 0.0]))
    with pytest.raises(ValueError, match=r"go up to 14\.6"):
        invert(transformers.model("sd3"), latent, "sd3", sigmas=torch.tensor([14.6, 5.0, 0.0]))
    with pytest.raises(ValueError, match=r"source_guidance is 3\.5: guidance other than 1 needs the negative prompt"):
        tiny_models.execute(FlowEdit, source=transformers.prompt("sd3", 1))
    with pytest.raises(ValueError, match="leave no step between them"):
        flow_edit("sd3", latent, start_percent=0.5, end_percent=0.5)
    with pytest.raises(ValueError, match="source acts in a part of the sampling only"):
        prompt = transformers.prompt("sd3", 1, start_percent=0.5, end_percent=1.0)
        (sampler,) = tiny_models.execute(FlowEdit, source=prompt, source_guidance=1.0)
        sampled(transformers.model("sd3"), Seeded(), sampler, latent, prompt)


def test_a_clip_is_inverted_whole_and_comes_back():
    """As the host's euler goes down from the inverted noise, through the sampler of exact rows as well."""
    model, clip = transformers.model("wan"), picture("wan", frames=3)
    trajectory, _, rebuilt, report, noise = invert(model, clip, "wan")
    assert trajectory.latents.shape == (STEPS + 1, 1, 16, 3, 12, 8) and trajectory.frames == 3
    assert "this is not the picture" not in report
    assert_close(sampled(model, noise, "euler", clip, transformers.prompt("wan", 1)), rebuilt["samples"])
    plain = invert(model, clip, "wan", flow_method="Euler")[2]["samples"]
    assert away(rebuilt["samples"], clip) < 0.75 * away(plain, clip)
    (exact,) = tiny_models.execute(FlowSampler, method="Euler", trajectory=trajectory, source_rows=1)
    found = sampled(model, noise, exact, clip, transformers.prompt("wan", 3))
    assert_close(found, clip, 1e-5)
    with pytest.raises(ValueError, match=r"for a latent of 3 frames, the sampled one has 2: .* invert the whole clip"):
        sampled(model, Seeded(), exact, clip[:, :, :2], transformers.prompt("wan", 3))


def test_a_picture_of_a_video_model_needs_no_dimension_of_frames():
    model = transformers.model("qwen")
    flat = invert(model, picture("qwen")[:, :, 0], "qwen", reconstruction_guidance=0.0)
    assert flat[1]["samples"].ndim == 5
    with pytest.raises(ValueError, match="16 latent channels"):
        invert(model, torch.ones(1, 4, 8, 8), "qwen")


def test_a_picture_that_does_not_come_back_is_said():
    model = transformers.model("qwen")
    assert "this is not the picture" not in invert(model, picture("qwen"), "qwen")[3]
    report = invert(model, picture("qwen"), "qwen", steps=2, flow_method="Euler")[3]
    assert "this is not the picture: take more steps" in report
    assert "distilled to a few steps" in report


def test_schnell_is_warned_of_whatever_comes_back():
    model = transformers.model("flux")
    config = model.model.model_config
    model.model.model_config = type("FluxSchnell", (type(config),), {})({"image_model": "flux"})
    model.model.model_config.unet_config = config.unet_config
    assert "distilled to a few steps" in invert(model, picture("flux"), "flux", reconstruction_guidance=0.0)[3]
