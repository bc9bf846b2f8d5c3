"""The Context-Aware Sampler in the host: exact without a bias, the equations with one, masks, guiders, cancelling."""

import itertools

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import pytest
import tiny_models
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, CFGGuider, DualCFGGuider, SamplerCustom
from contextdiff.acting import adapter, flow
from palimpsest.kernels import contextdiff
from palimpsest.nodes.contextdiff.adapter import ContextAdapter
from palimpsest.nodes.contextdiff.nodes import ContextSampler
from palimpsest.nodes.contextdiff.sampling import ContextSampling, SamplerSettings, prompts_of

import nodes

STEPS, GUIDANCE = 4, 3.0
WIDTH = tiny_models.SD15["context_dim"]

pytestmark = pytest.mark.usefixtures("inference")


def sampler(model, random=0.3, **settings):
    """The node's sampler for a given adapter, or one made here, with a last layer of this size."""
    made = settings.pop("context_adapter", None) or adapter(model, random)
    return tiny_models.execute(ContextSampler, context_adapter=made, **settings)[0]


def stock(name):
    return comfy.samplers.sampler_object(name)


def levels(model, scheduler="normal", steps=STEPS):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def guide(model, family="sd15", cfg=GUIDANCE, positive=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or tiny_models.prompt(1, family=family), tiny_models.prompt(2, family=family))
    guider.set_cfg(cfg)
    return guider


def run(guider, sampling, sigmas, pictures=1, *, size=(8, 8), add_noise=True, latent=None, **others):
    """A guider's own sampling from seeded noise: the LATENT tensor."""
    start = torch.zeros(pictures, 4, *size) if latent is None else latent
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(3)) * add_noise
    return guider.sample(noise, start, sampling, sigmas, disable_pbar=True, seed=5, **others)


def assert_acts(picture, without):
    assert torch.isfinite(picture).all()
    assert (picture - without).norm() > 1e-4 * without.norm()


# ---- without a bias it is the stock sampler


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("settings", "name"),
    [({}, "euler"), ({}, "ddim"), ({"eta": 1.0}, "euler_ancestral"), ({"mode": "ddpm"}, "ddpm")],
)
@pytest.mark.parametrize("nothing", ["strength 0", "untrained", "released code"])
def test_without_a_bias_it_is_the_stock_sampler_bit_for_bit(family, settings, name, nothing):
    model = tiny_models.unet(family)
    changes = {"strength 0": {"strength": 0.0}, "released code": {"formula": "released code"}}.get(nothing, {})
    ours = sampler(model, 0.0 if nothing == "untrained" else 0.3, **settings, **changes)
    for scheduler in ("normal", "karras"):
        sigmas = levels(model, scheduler)
        assert torch.equal(
            run(guide(model, family), ours, sigmas, 2), run(guide(model, family), stock(name), sigmas, 2)
        )


def test_a_video_adapter_that_is_untrained_changes_nothing():
    model = tiny_models.unet()
    ours = sampler(model, context_adapter=adapter(model, 0.0, video=True))
    assert torch.equal(run(guide(model), ours, levels(model), 3), run(guide(model), stock("euler"), levels(model), 3))


@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION"])
def test_inverting_without_a_bias_is_the_stock_sampler_on_flipped_levels(prediction):
    model, latent = tiny_models.unet(prediction=prediction), tiny_models.latent()["samples"]
    sigmas, plain = levels(model).flip(0), sampler(model, strength=0.0, inversion_refinements=0)
    ours = run(guide(model), plain, sigmas, latent=latent, add_noise=False)
    sigmas[0] = 0.0001  # as FlipSigmas does
    assert torch.equal(ours, run(guide(model), stock("euler"), sigmas, latent=latent, add_noise=False))


def test_the_unpatched_model_and_the_inputs_stay_as_they_were():
    model, latent = tiny_models.unet(), tiny_models.latent()["samples"]
    sigmas, kept = levels(model), latent.clone()
    before = run(guide(model), stock("euler"), sigmas, latent=latent)
    run(guide(model), sampler(model), sigmas, latent=latent)
    assert torch.equal(before, run(guide(model), stock("euler"), sigmas, latent=latent))
    assert torch.equal(latent, kept)
    assert torch.equal(sigmas, levels(model))


# ---- with a bias it is the paper's update


class Recording:
    """A guider whose every call of the model is noted: (x, sigma, denoised)."""

    def __init__(self, model, **settings):
        self.guider, self.calls = guide(model, **settings), []
        predict = self.guider.predict_noise

        def note(x, timestep, *args, **kwargs):
            out = predict(x, timestep, *args, **kwargs)
            self.calls.append((x.clone(), timestep[0].item(), out.clone()))
            return out

        self.guider.predict_noise = note


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(("mode", "strength"), [("ddim", 1.0), ("ddim", 0.5), ("ddpm", 1.0)])
def test_every_step_is_the_papers_update_from_what_the_model_predicted(family, mode, strength, monkeypatch):
    """In the paper's variables and in float64, by `posterior_mean` (eq. 7) or `contextual_ddim` (eq. 11)."""
    model = tiny_models.unet(family)
    made, recording = adapter(model), Recording(model, family=family)
    ours = sampler(model, context_adapter=made, mode=mode, strength=strength)
    if mode == "ddpm":  # its mean
        monkeypatch.setattr(
            comfy.k_diffusion.sampling, "default_noise_sampler", lambda x, seed: lambda *_: torch.zeros_like(x)
        )
    last = run(recording.guider, ours, levels(model), 2)
    last = model.model.process_latent_in(last)
    text = tiny_models.prompt(1, family=family)[0][0].expand(2, -1, -1)
    states = [*recording.calls, (last, 0.0, last)]
    top = float(model.get_model_object("model_sampling").sigma_max) * (1 - 1e-5)

    def bias(clean, sigma):
        signal = contextdiff.noise_angle(sigma)
        scale = strength * contextdiff.bias_scale(1 / (1 + sigma**2) ** 0.5) if sigma < top else 0.0
        return scale * made(clean, text, signal).double()

    form = {"ddim": contextdiff.contextual_ddim, "ddpm": contextdiff.posterior_mean}[mode]
    for (x, sigma, clean), (x_next, sigma_next, _) in itertools.pairwise(states):
        signal, signal_next = (1 / (1 + s**2) ** 0.5 for s in (sigma, sigma_next))
        z = form(x.double() * signal, clean.double(), bias(clean, sigma), bias(clean, sigma_next), signal, signal_next)
        torch.testing.assert_close(x_next.double() * signal_next, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["ddim", "ddpm"])
def test_the_adapter_acts_and_strength_is_its_measure(mode):
    model = tiny_models.unet()
    plain = run(guide(model), sampler(model, mode=mode, strength=0.0), levels(model))
    shifts = [
        (run(guide(model), sampler(model, mode=mode, strength=s), levels(model)) - plain).norm()
        for s in (0.25, 0.5, 1.0)
    ]
    assert 0 < shifts[0] < shifts[1] < shifts[2]


def test_the_formula_it_was_trained_with_is_the_default():
    model = tiny_models.unet()
    trained = sampler(model, context_adapter=adapter(model, info={"formula": "released code"}))
    asked = sampler(model, formula="released code")
    assert torch.equal(run(guide(model), trained, levels(model)), run(guide(model), asked, levels(model)))
    assert_acts(run(guide(model), sampler(model), levels(model)), run(guide(model), asked, levels(model)))


@pytest.mark.parametrize(("settings", "acts"), [((0.0, 0.01), False), ((0.99, 1.0), False), ((0.2, 0.8), True)])
def test_outside_its_window_the_adapter_does_not_act(settings, acts):
    model = tiny_models.unet()
    sigmas = levels(model, steps=8)[:-2]  # without the levels that the last hundredth begins at
    plain = run(guide(model), stock("euler"), sigmas)
    ours = sampler(model, start_percent=settings[0], end_percent=settings[1])
    found = run(guide(model), ours, sigmas)
    assert torch.equal(found, plain) is not acts
    if acts:
        assert_acts(found, run(guide(model), sampler(model), sigmas))


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_window_without_a_step_is_refused(at):
    model = tiny_models.unet()
    with pytest.raises(ValueError, match="leave no step between them"):
        run(guide(model), sampler(model, start_percent=at, end_percent=at), levels(model))


def test_every_input_arrives_in_its_field():
    """All values unlike one another, and unlike the defaults."""
    chosen = {
        "mode": "ddpm",
        "formula": "released code",
        "strength": 1.1,
        "eta": 0.2,
        "start_percent": 0.3,
        "end_percent": 0.4,
        "limit": 0.5,
        "inversion_refinements": 6,
    }
    made = adapter(tiny_models.unet())
    function = tiny_models.execute(ContextSampler, context_adapter=made, **chosen)[0].sampler_function
    assert function.adapter is made
    assert function.settings.named() == chosen
    assert all(value != getattr(SamplerSettings(), name) for name, value in chosen.items())
    assert {entry.id for entry in ContextSampler.define_schema().inputs} == {*chosen, "context_adapter"}


def test_the_limit_caps_the_shift():
    model = tiny_models.unet()
    plain = run(guide(model), stock("euler"), levels(model))
    loose, tight, tighter = (
        (run(guide(model), sampler(model, 30.0, limit=limit), levels(model)) - plain).norm() for limit in (0, 0.1, 0.05)
    )
    assert loose > 10 * tight > 10 * tighter > 0


@pytest.mark.parametrize("timestep", [True, False])
def test_the_adapter_runs_once_for_levels_at_which_it_cannot_differ(timestep, monkeypatch):
    """Not at k_T = 0, not at the clean level, and once a step where r does not depend on the level."""
    model, asked = tiny_models.unet(), []
    call = ContextAdapter.__call__
    monkeypatch.setattr(ContextAdapter, "__call__", lambda self, *args: (asked.append(args[2]), call(self, *args))[1])
    ours = sampler(model, context_adapter=adapter(model, timestep=timestep))
    run(guide(model), ours, levels(model))
    assert len(asked) == (2 * STEPS - 2 if timestep else STEPS)


# ---- where a run begins


def test_a_run_in_two_halves_is_the_run_in_one():
    model, ours = tiny_models.unet(), sampler(tiny_models.unet())
    sigmas = levels(model, steps=6)
    half = run(guide(model), ours, sigmas[:4])
    both = run(guide(model), ours, sigmas[3:], latent=half, add_noise=False)
    torch.testing.assert_close(both, run(guide(model), ours, sigmas), rtol=1e-4, atol=1e-4)


def test_a_noised_picture_begins_with_the_bias_of_equation_1():
    model, latent = tiny_models.unet(), tiny_models.latent()["samples"]
    made, recording, plain = adapter(model), Recording(model), Recording(model)
    sigmas = levels(model, steps=8)[4:]
    run(recording.guider, sampler(model, context_adapter=made), sigmas, latent=latent)
    run(plain.guider, stock("euler"), sigmas, latent=latent)
    clean, sigma = model.model.process_latent_in(latent.clone()), sigmas[0].item()
    r = made(clean, tiny_models.prompt(1)[0][0], contextdiff.noise_angle(sigma))
    wanted = plain.calls[0][0] + contextdiff.bias_level(sigma) * r
    torch.testing.assert_close(recording.calls[0][0], wanted)


@pytest.mark.parametrize("first", [0, 4], ids=["the noisiest level", "a lower one, no picture"])
def test_pure_noise_begins_without_a_bias(first):
    model = tiny_models.unet()
    recording, plain = Recording(model), Recording(model)
    sigmas = levels(model, steps=8)[first:]
    run(recording.guider, sampler(model), sigmas)
    run(plain.guider, stock("euler"), sigmas)
    (x, _, clean), (x_plain, _, clean_plain) = recording.calls[0], plain.calls[0]
    assert torch.equal(x, x_plain)
    # and the first step takes none away: all of the difference is the next level's bias
    r = adapter(model)(clean, tiny_models.prompt(1)[0][0], contextdiff.noise_angle(sigmas[1].item()))
    wanted = plain.calls[1][0] + contextdiff.bias_level(sigmas[1].item()) * r
    assert torch.equal(clean, clean_plain)
    torch.testing.assert_close(recording.calls[1][0], wanted)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_an_inversion_is_undone_by_sampling_and_exactly_with_refinements(family):
    model, latent = tiny_models.unet(family), tiny_models.latent()["samples"]
    made, sigmas, error = adapter(model, 0.03), levels(model, steps=12), []
    for refinements in (0, 2, 12):
        up = sampler(model, context_adapter=made, inversion_refinements=refinements)
        noise = run(guide(model, family, 1.0), up, sigmas.flip(0), latent=latent, add_noise=False)
        down = sampler(model, context_adapter=made)
        back = run(guide(model, family, 1.0), down, sigmas, latent=noise, add_noise=False)
        error.append(((back - latent).norm() / latent.norm()).item())
    assert error[2] < 1e-3 < error[1] < 0.2 * error[0] < 0.1


def test_refinements_cost_their_model_calls_only_on_the_way_up():
    model, latent = tiny_models.unet(), tiny_models.latent()["samples"]
    ours = sampler(model, inversion_refinements=2)
    up, down = Recording(model), Recording(model)
    run(up.guider, ours, levels(model).flip(0), latent=latent, add_noise=False)
    run(down.guider, ours, levels(model))
    assert (len(up.calls), len(down.calls)) == (3 * STEPS, STEPS)


# ---- what else a graph may hold


def test_a_batch_is_its_pictures_one_by_one_but_a_clip_is_not():
    model, latent = tiny_models.unet(), tiny_models.latent(3)["samples"]
    sigmas = levels(model)[1:]

    def sampled(made, pictures):
        return run(guide(model), sampler(model, context_adapter=made), sigmas, latent=pictures, add_noise=False)

    for made, same in ((adapter(model), True), (adapter(model, video=True), False)):
        together = sampled(made, latent)
        alone = torch.cat([sampled(made, latent[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together[:1], alone[:1], rtol=1e-4, atol=1e-4)  # a clip is causal
        assert torch.allclose(together, alone, rtol=1e-4, atol=1e-4) is same


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (5, 16)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_odd_sizes(size, patch):
    model = tiny_models.unet()
    ours = sampler(model, context_adapter=adapter(model, patch=patch))
    found = run(guide(model), ours, levels(model), size=size)
    assert found.shape[-2:] == size
    assert torch.isfinite(found).all()


def test_outside_of_a_mask_the_picture_stays():
    model, latent = tiny_models.unet(), tiny_models.latent()["samples"]
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    ours = run(guide(model), sampler(model), levels(model), latent=latent, denoise_mask=mask)
    plain = run(guide(model), stock("euler"), levels(model), latent=latent, denoise_mask=mask)
    torch.testing.assert_close(ours[..., :4], latent[..., :4], rtol=1e-4, atol=1e-4)
    assert_acts(ours[..., 4:], plain[..., 4:])


def test_every_step_is_shown_as_the_stock_sampler_shows_it():
    model, seen = tiny_models.unet(), {}
    for name, sampling in (("ours", sampler(model, 0.0)), ("stock", stock("euler"))):
        seen[name] = []

        def show(step, denoised, x, total, name=name):
            seen[name].append((step, denoised.clone(), x.clone(), total))

        run(guide(model), sampling, levels(model), callback=show)
    assert len(seen["ours"]) == STEPS
    for ours, other in zip(seen["ours"], seen["stock"], strict=True):
        assert (ours[0], ours[3]) == (other[0], other[3])
        assert torch.equal(ours[1], other[1])
        assert torch.equal(ours[2], other[2])


def test_cancelling_stops_the_run_and_leaves_nothing_behind():
    model, ours, steps = tiny_models.unet(), sampler(tiny_models.unet()), []

    def cancel(step, *_):
        steps.append(step)
        comfy.model_management.interrupt_current_processing(step == 1)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(guide(model), ours, levels(model), callback=cancel)
    assert steps == [0, 1]
    assert torch.isfinite(run(guide(model), ours, levels(model))).all()


def test_the_hosts_sampling_nodes_take_it():
    model = tiny_models.unet()
    inputs = {
        "model": model, "add_noise": True, "noise_seed": 5, "cfg": GUIDANCE, "positive": tiny_models.prompt(1),
        "negative": tiny_models.prompt(2), "sigmas": levels(model), "latent_image": tiny_models.latent(2),
    }  # fmt: skip
    ours = tiny_models.execute(SamplerCustom, sampler=sampler(model), **inputs)[0]["samples"]
    plain = tiny_models.execute(SamplerCustom, sampler=stock("euler"), **inputs)[0]["samples"]
    assert_acts(ours, plain)


def test_any_guider_will_do():
    model = tiny_models.unet()
    one, two, three = (tiny_models.prompt(seed) for seed in (1, 2, 3))
    guiders = (
        lambda: tiny_models.execute(BasicGuider, model=model, conditioning=one)[0],
        lambda: tiny_models.execute(CFGGuider, model=model, positive=one, negative=two, cfg=GUIDANCE)[0],
        lambda: tiny_models.execute(
            DualCFGGuider, model=model, cond1=one, cond2=three, negative=two, cfg_conds=2.0, cfg_cond2_negative=GUIDANCE
        )[0],
    )
    for make in guiders:
        plain = run(make(), stock("euler"), levels(model))
        assert torch.equal(run(make(), sampler(model, 0.0), levels(model)), plain)
        assert_acts(run(make(), sampler(model), levels(model)), plain)


def test_the_prompt_is_the_positive_one():
    """Another negative prompt of the same prediction gives the same bias; another positive one does not."""
    model, made = tiny_models.unet(), adapter(tiny_models.unet())
    seen = []

    class Reading(ContextAdapter):
        def __call__(self, clean, text, angle, picture=None):
            seen.append(text)
            return super().__call__(clean, text, angle, picture)

    reading = Reading(made.config, made.patcher, made.info)
    run(guide(model), sampler(model, context_adapter=reading), levels(model), 2)
    wanted = tiny_models.prompt(1)[0][0]
    assert all(torch.equal(text, wanted.expand(2, -1, -1)) for text in seen)


def test_regional_prompts_act_where_they_are():
    model, made = tiny_models.unet(), adapter(tiny_models.unet(), patch=1)
    left, right = tiny_models.prompt(1), tiny_models.prompt(4, tokens=14)
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    clean = tiny_models.latent()["samples"]
    regions = [
        [left[0][0], {"mask": mask, "set_area_to_bounds": False, "mask_strength": 1.0}],
        [right[0][0], {"area": (8, 4, 0, 4), "strength": 1.0}],
    ]
    kept = []

    class Keep(ContextSampling):
        def bias_of(self, guider, x):
            kept.append(super().bias_of(guider, x))
            return kept[-1]

    function = Keep(made, SamplerSettings(formula="paper"))
    run(guide(model, positive=regions), comfy.samplers.KSAMPLER(function), levels(model))
    (found,) = kept[0].pair(clean, 2.0)
    angle, scale = contextdiff.noise_angle(2.0), contextdiff.bias_level(2.0)
    whole = [scale * made(clean, prompt[0][0], angle) for prompt in (left, right)]
    torch.testing.assert_close(found[..., :4], whole[0][..., :4])
    torch.testing.assert_close(found[..., 4:], whole[1][..., 4:])


def test_a_prompt_of_a_time_range_acts_within_it():
    model = tiny_models.unet()
    first, then = tiny_models.prompt(1), tiny_models.prompt(4)

    def ranged(prompt, start, end):
        return nodes.ConditioningSetTimestepRange().set_range(prompt, start, end)[0]

    both = ranged(first, 0.0, 0.5) + ranged(then, 0.5, 1.0)
    found = run(guide(model, positive=both), sampler(model), levels(model, steps=8))
    plain = run(guide(model, positive=both), stock("euler"), levels(model, steps=8))
    assert_acts(found, plain)


def test_a_lora_a_controlnet_and_attention_patches_stay_active():
    import comfy.sd

    model, calls = tiny_models.unet(), []
    patched = comfy.sd.load_lora_for_models(model, None, tiny_models.lora(model), 1.0, 0.0)[0]
    patched.set_model_attn1_patch(lambda n, context, value, options: (calls.append(1), (n, context, value))[1])
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        tiny_models.prompt(1), tiny_models.prompt(2), tiny_models.controlnet(), tiny_models.picture(), 0.5, 0.0, 1.0
    )
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(positive, negative)
    guider.set_cfg(GUIDANCE)
    assert_acts(run(guider, sampler(model), levels(model)), run(guide(model), sampler(model), levels(model)))
    assert calls


# ---- flow-matching models


def test_a_flow_model_takes_its_own_form_of_the_bias():
    model = flow(tiny_models.unet())
    plain = run(guide(model), stock("euler"), levels(model))
    assert torch.equal(run(guide(model), sampler(model, 0.0), levels(model)), plain)
    made, recording = adapter(model), Recording(model)
    last = run(recording.guider, sampler(model, context_adapter=made), levels(model))
    assert_acts(last, plain)
    text = tiny_models.prompt(1)[0][0]
    for (x, s, clean), (x_next, s_next, _) in itertools.pairwise(recording.calls):
        bias, bias_next = (
            contextdiff.flow_bias_level(v) * made(clean, text, contextdiff.flow_noise_angle(v)) for v in (s, s_next)
        )
        wanted = (1 - s_next) * clean + s_next / s * (x - (1 - s) * clean - bias) + bias_next
        torch.testing.assert_close(x_next, wanted, rtol=1e-4, atol=1e-4)


# ---- what is refused


@pytest.mark.parametrize("settings", [{"mode": "ddpm"}, {"eta": 0.5}])
def test_adding_noise_is_refused_where_it_has_no_meaning(settings):
    model = tiny_models.unet()
    with pytest.raises(ValueError, match="cannot invert"):
        run(guide(model), sampler(model, **settings), levels(model).flip(0))
    with pytest.raises(ValueError, match=r"cannot invert|ddpm.*flow-matching model has not: choose mode ddim"):
        run(guide(flow(model)), sampler(model, **settings), levels(flow(model)).flip(0))


def test_a_flow_model_takes_fresh_noise_as_the_hosts_ancestral_sampler_does():
    model = flow(tiny_models.unet())
    plain = run(guide(model), stock("euler_ancestral"), levels(model))
    assert torch.equal(run(guide(model), sampler(model, 0.0, eta=1.0), levels(model)), plain)
    assert_acts(run(guide(model), sampler(model, eta=1.0), levels(model)), plain)
    with pytest.raises(ValueError, match="flow-matching model has not: choose mode ddim"):
        run(guide(model), sampler(model, mode="ddpm"), levels(model))


def test_an_adapter_of_another_family_is_refused_by_name():
    model, other = tiny_models.unet(), tiny_models.unet("sdxl")
    with pytest.raises(ValueError, match=r"SDXL latents.*SD15 latents"):
        run(guide(model), sampler(other), levels(model))


def test_a_prompt_of_another_width_is_refused():
    model = tiny_models.unet()
    wide = [[torch.randn(1, 7, WIDTH + 1), {}]]
    with pytest.raises(ValueError, match=rf"{WIDTH} channels, this prompt has {WIDTH + 1}"):
        adapter(model)(tiny_models.latent()["samples"], wide[0][0], 0.5)


def test_latents_with_a_time_axis_are_refused():
    model = tiny_models.unet()
    function = ContextSampling(adapter(model), SamplerSettings(formula="paper"))
    guider = guide(model)
    guider.inner_model = model.model
    with pytest.raises(ValueError, match="5 dimensions: give a clip as a batch of frames"):
        function.bias_of(guider, torch.zeros(1, 4, 2, 8, 8))


def test_a_guider_without_text_is_refused():
    class Guider:
        def __init__(self, conds):
            self.conds = conds

    for conds in ({}, {"positive": []}, {"positive": [{}]}):
        with pytest.raises(ValueError, match="positive prompt"):
            prompts_of(Guider(conds))
