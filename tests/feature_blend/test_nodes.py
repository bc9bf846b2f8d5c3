"""Feature Blend in the host's own classes: what is blended where, and that nothing else is touched."""

import dataclasses
from pathlib import Path

import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import tiny_models
import torch
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from palimpsest.kernels import feature_blend as maths
from palimpsest.kernels.ddim import rescale_to_level
from palimpsest.nodes.feature_blend import apply as feature_apply
from palimpsest.nodes.feature_blend import blend as feature_blend
from palimpsest.nodes.feature_blend import cache as feature_cache
from palimpsest.nodes.feature_blend import files
from palimpsest.nodes.feature_blend import layers as layering
from palimpsest.nodes.feature_blend.nodes import FeatureBlend, LoadBlendWeights, SaveBlendWeights, TuneFeatureBlend
from palimpsest.nodes.feature_blend.weights import BlendWeights
from palimpsest.nodes.inversion.nodes import Invert

import nodes

STEPS, GUIDANCE = 3, 3.0
EVERYTHING = "input, middle, output, out"


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def original(family="sd15"):
    """The prompt that describes the original."""
    return tiny_models.prompt(1, family=family)


def edits(family="sd15"):
    """(positive, negative) of an edit."""
    return tiny_models.prompt(3, family=family), tiny_models.prompt(2, tokens=7, family=family)


def invert(model, latent, prompt, steps=STEPS):
    """(trajectory, inverted noise)."""
    found = tiny_models.execute(
        Invert, model=model, latent=latent, positive=prompt, steps=steps, reconstruction_guidance=0.0
    )
    return found[0], found[1]["samples"]


def blend(model, trajectory, prompt=None, **settings):
    """The model behind Feature Blend, which by default here holds no latents."""
    settings = {"blend_latents_until": 0.0, "positive": prompt or original()} | settings
    return tiny_models.execute(FeatureBlend, model=model, trajectory=trajectory, **settings)[0]


def sample(model, noise, positive=None, negative=None, *, steps=STEPS, sampler="euler", random=False, **others):
    """The host's own sampler, from inverted noise or from random noise over it."""
    usual = edits("sdxl" if model.model.diffusion_model.num_classes else "sd15")
    sampling = comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler, "normal")
    settings = {"cfg": GUIDANCE, "latent_image": noise, "disable_pbar": True, "seed": 1} | others
    start = torch.randn(noise.shape, generator=torch.Generator().manual_seed(9)) if random else torch.zeros_like(noise)
    return sampling.sample(start, positive or usual[0], negative or usual[1], **settings)


def half(side=64, value=1.0):
    """A mask that is white on the left."""
    mask = torch.zeros(1, side, side)
    mask[..., : side // 2] = value
    return mask


def differs(picture, other):
    """Whether a finite picture differs from another by more than rounding."""
    assert torch.isfinite(picture).all()
    return bool((picture - other).norm() > 1e-5 * other.norm())


@pytest.fixture(scope="module")
def inverted():
    """(model, trajectory, inverted noise) of one picture."""
    with torch.inference_mode():
        model = tiny_models.unet()
        return model, *invert(model, tiny_models.latent(), original())


@pytest.fixture(scope="module")
def plain(inverted):
    """What the model samples from that noise with nothing blended."""
    with torch.inference_mode():
        return sample(inverted[0], inverted[2])


# ---- names of features


def layers_of(family):
    return layering.feature_layers(tiny_models.unet_without_weights(family))


@pytest.mark.parametrize(
    ("family", "choose", "text"),
    [
        ("sd15-full", layering.pfb_object, "input 8-11, middle, output 1-5"),
        ("sd15-full", layering.pfb_background, "input 7-11, middle, output 1-5"),
        ("sd15-full", layering.paper, "output 0-11, out"),
        ("sdxl-full", layering.pfb_object, "input 8, middle, output 1-2"),
        ("sdxl-full", layering.pfb_background, "input 7-8, middle, output 1-2"),
        ("sdxl-full", layering.paper, "output 0-8, out"),
    ],
)
def test_presets_choose_the_papers_features(family, choose, text):
    layers = layers_of(family)
    assert layering.written(choose(layers)) == text
    assert layering.parse(text, layers) == choose(layers)


def test_texts_name_features_in_any_order_and_places_as_a_whole():
    layers = layers_of("sd15-full")
    assert layering.written(layering.parse(" out,middle , output 3-4,output 1,", layers)) == (
        "middle, output 1, output 3-4, out"
    )
    assert layering.written(layering.parse("input, out", layers)) == "input 1-11, out"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("decoder", "'decoder' is not a feature"),
        ("output 12", "no 'output 12'; its features are output 0 to 11"),
        ("input 0-3", "input of input block 0 is the latent"),
        ("output 5-3", "no 'output 5-3'"),
        (" , ", "layers is empty"),
    ],
)
def test_texts_that_name_nothing_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        layering.parse(text, layers_of("sd15-full"))


@pytest.mark.parametrize(
    ("family", "size"), [("sd15", (8, 8)), ("sd15", (9, 13)), ("sdxl", (10, 14)), ("sdxl-deep", (9, 13))]
)
def test_shapes_are_known_before_anything_runs(family, size):
    model = tiny_models.unet(family)
    trajectory, _ = invert(model, tiny_models.latent(1, *size), original(family), steps=1)
    recorded = cached(model, trajectory, original(family))
    expected = {layer.key: layer.shape(*size) for layer in layering.feature_layers(model)}
    assert recorded.shapes == expected


def step_of(patched):
    """What a patched model blends."""
    (named,) = patched.wrappers["predict_noise"].values()
    return named[0].blend


def cached(model, trajectory, prompt=None, layers=EVERYTHING):
    """The features that Feature Blend records."""
    patched = blend(model, trajectory, prompt, layers=layers, features="cached", alpha_inside=0.5)
    return step_of(patched).features


# ---- what is blended


def calls(model, x, sigma, positive, negative=None, guidance=1.0):
    """The host's denoised picture of x at a level, with patches, guidance and all."""
    found = []

    def once(run, start, sigmas, extra_args, callback, disable=False, **_):
        found.append(run(x.to(start), start.new_full((len(start),), sigma), **extra_args))
        return start

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative or positive)
    guider.set_cfg(guidance)
    sampler = comfy.samplers.KSAMPLER(once)
    guider.sample(torch.zeros_like(x), x, sampler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
    return found[0]


@pytest.mark.parametrize("features", ["cached", "same step"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_with_alpha_0_everywhere_the_noise_is_the_references_own(family, features):
    model, prompt = tiny_models.unet(family), original(family)
    trajectory, _ = invert(model, tiny_models.latent(), prompt)
    patched = blend(model, trajectory, prompt, layers=EVERYTHING, alpha_inside=0.0, features=features)
    edit = tiny_models.latent(seed=5)["samples"]
    for i in range(STEPS):
        sigma, x = trajectory.sigmas[i], trajectory.latents[i]
        expected = x - calls(model, x, sigma, prompt)
        noise = edit - calls(patched, edit, sigma, *edits(family), GUIDANCE)
        torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-4)


class SeenInputs:
    """What every block of a network is given while it is looked at."""

    def __init__(self, model):
        network, self.seen, self.handles = model.model.diffusion_model, [], []
        for place, number, block in layering.host.blocks(network):
            self.watch((place, number), block)
        self.watch(layering.OUT, network.out[0])

    def watch(self, name, module):
        def note(_, args):
            self.seen.append((name, args[0].clone()))

        first = module[0] if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) else module
        self.handles.append(first.register_forward_pre_hook(note))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def passes(self):
        """One dictionary for every pass of the network."""
        found = []
        for name, h in self.seen:
            if name == ("input", 0):
                found.append({})
            found[-1][name] = h
        return found


def features_by_name(layers):
    return [str(layer) for layer in layers]


@pytest.mark.parametrize("features", ["cached", "same step"])
@pytest.mark.parametrize("name", ["input 1", "input 2", "input 3", "middle", "output 0", "output 2", "output 3", "out"])
def test_a_feature_is_the_input_of_its_block_and_skips_stay_the_edits(inverted, name, features):
    model, trajectory, _ = inverted
    (layer,) = layering.parse(name, layering.feature_layers(model))
    patched = blend(model, trajectory, layers=name, alpha_inside=0.25, features=features)
    x, sigma = tiny_models.latent(seed=5)["samples"], trajectory.sigmas[1]
    with SeenInputs(model) as looked:
        calls(model, trajectory.latents[1], sigma, original())
        calls(model, x, sigma, *edits(), GUIDANCE)
        calls(patched, x, sigma, *edits(), GUIDANCE)
    reference, untouched, *_, blended = looked.passes()
    key, channels = layer.key, layer.channels
    expected = torch.lerp(reference[key][:, :channels], untouched[key][:, :channels], 0.25)
    torch.testing.assert_close(blended[key][:, :channels], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(blended[key][:, channels:], untouched[key][:, channels:])
    order = list(untouched)
    for before in order[: order.index(key)]:
        assert torch.equal(blended[before], untouched[before])


@pytest.mark.parametrize("value", [1.0, 0.6], ids=["hard", "soft"])
@pytest.mark.parametrize("side", [8, 50, 512])
def test_the_mask_weighs_the_two_alphas(inverted, side, value):
    model, trajectory, _ = inverted
    mask = half(side, value)
    patched = blend(model, trajectory, layers="output 3", alpha_inside=0.75, alpha_outside=0.125, mask=mask)
    x, sigma = tiny_models.latent(seed=5)["samples"], trajectory.sigmas[0]
    with SeenInputs(model) as looked:
        calls(model, trajectory.latents[0], sigma, original())
        calls(model, x, sigma, *edits(), GUIDANCE)
        calls(patched, x, sigma, *edits(), GUIDANCE)
    reference, untouched, blended = ([p[("output", 3)] for p in looked.passes()][i] for i in (0, 1, -1))
    weight = torch.full((8, 8), 0.125)
    weight[:, :4] = value * 0.75 + (1 - value) * 0.125
    channels = 32
    expected = torch.lerp(reference[:, :channels].expand(2, -1, -1, -1), untouched[:, :channels], weight)
    torch.testing.assert_close(blended[:, :channels], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("name", ["middle, output 1", EVERYTHING])
def test_cached_features_are_those_of_the_same_step(inverted, plain, name, sampler):
    model, trajectory, noise = inverted
    settings = {"layers": name, "alpha_inside": 0.5}
    both = [
        sample(blend(model, trajectory, features=features, **settings), noise, sampler=sampler)
        for features in ("cached", "same step")
    ]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
    assert differs(both[0], plain)


def test_between_recorded_levels_the_latents_are_interpolated_and_cached_features_the_nearest(inverted):
    model, trajectory, noise = inverted
    middle = (trajectory.sigmas[0] + trajectory.sigmas[1]) / 2
    torch.testing.assert_close(
        feature_blend.latents_at(trajectory, middle), (trajectory.latents[0] + trajectory.latents[1]) / 2
    )
    for i, sigma in enumerate(trajectory.sigmas):
        assert torch.equal(feature_blend.latents_at(trajectory, sigma), trajectory.latents[i])
    above = feature_blend.latents_at(trajectory, 2 * trajectory.sigmas[0])
    torch.testing.assert_close(above, 2 * trajectory.latents[0] - trajectory.latents[-1], rtol=1e-5, atol=1e-4)
    for features in ("cached", "same step"):
        assert differs(sample(blend(model, trajectory, features=features, alpha_inside=0.5), noise, steps=5), noise)


def test_outside_of_its_percents_nothing_is_blended(inverted, plain):
    model, trajectory, noise = inverted
    levels = len(
        step_of(blend(model, trajectory, alpha_inside=0.0, end_percent=0.3, features="cached")).features.levels
    )
    assert levels == sum(s > model.model.model_sampling.percent_to_sigma(0.3) for s in trajectory.sigmas) < STEPS
    early = sample(blend(model, trajectory, alpha_inside=0.0, end_percent=0.3), noise)
    late = sample(blend(model, trajectory, alpha_inside=0.0, start_percent=0.3), noise)
    always = sample(blend(model, trajectory, alpha_inside=0.0), noise)
    assert differs(early, plain) and differs(late, plain) and differs(early, always) and differs(late, always)
    assert torch.equal(
        sample(blend(model, trajectory, alpha_inside=0.0, start_percent=0.5, end_percent=0.5), noise), plain
    )


def test_a_window_without_a_level_is_refused(inverted):
    with pytest.raises(ValueError, match="no level of the trajectory lies between"):
        blend(*inverted[:2], alpha_inside=0.5, start_percent=0.98, end_percent=0.99)
    with pytest.raises(ValueError, match=r"end_percent 0\.2 lies before start_percent 0\.5"):
        blend(*inverted[:2], alpha_inside=0.5, start_percent=0.5, end_percent=0.2)


# ---- identity


def test_alphas_of_1_are_a_plain_clone_at_no_cost(inverted, plain):
    model, trajectory, noise = inverted
    patched, report = tiny_models.execute(
        FeatureBlend, model=model, trajectory=trajectory, positive=original(), alpha_outside=1.0, mask=half(),
        blend_latents_until=0.0, layers=EVERYTHING,
    )  # fmt: skip
    assert not any(patched.wrappers.values()) and not patched.object_patches
    assert patched.model_options["transformer_options"].get("patches", {}) == {}
    assert torch.equal(sample(patched, noise), plain)
    assert "nothing is blended" in report


def test_a_white_mask_and_alpha_1_inside_is_bit_identical_though_it_blends(inverted, plain):
    model, trajectory, noise = inverted
    patched = blend(model, trajectory, mask=torch.ones(1, 8, 8), layers=EVERYTHING, blend_latents_until=1.0)
    assert torch.equal(sample(patched, noise), plain)


def test_the_model_is_itself_afterwards_though_its_end_was_replaced(inverted, plain):
    model, trajectory, noise = inverted
    sample(model, noise)  # another test's clone may be loaded
    out, keys = model.model.diffusion_model.out, list(model.model.state_dict())
    patched = blend(model, trajectory, layers=EVERYTHING, alpha_inside=0.5, features="same step")
    assert differs(sample(patched, noise), plain)
    assert list(model.model.state_dict()) == keys  # while the replacement stands
    assert torch.equal(sample(model, noise), plain)
    assert model.model.diffusion_model.out is out


def test_what_is_not_masked_is_not_silently_nothing(inverted):
    model, trajectory, _ = inverted
    for preset in ("custom", "PFB-Diff object", "PFB-Diff background"):
        with pytest.raises(ValueError, match="connect a mask"):
            blend(model, trajectory, preset=preset)
    assert differs(sample(blend(model, trajectory, preset="paper"), inverted[2]), inverted[2])


def test_the_papers_preset_takes_no_mask(inverted):
    model, trajectory, noise = inverted
    with_mask = blend(model, trajectory, preset="paper", mask=half())
    torch.testing.assert_close(
        sample(with_mask, noise), sample(blend(model, trajectory, preset="paper"), noise), rtol=1e-5, atol=1e-5
    )


# ---- latents


def walked(model, noise, **settings):
    """Latents after every step of Euler sampling, in the model's scale."""
    found = []
    sample(model, noise, callback=lambda step, denoised, x, total: found.append(x.clone()), **settings)
    end = model.model.process_latent_in(sample(model, noise, **settings))
    return [*found, end]


LATENTS = {"alpha_outside": 1.0, "mask": half(), "blend_latents_until": 1.0}
BLACK = (..., slice(4, 8))


@pytest.mark.parametrize("random", [False, True], ids=["inverted noise", "random noise"])
@pytest.mark.parametrize("reference", ["trajectory", "re-noised original"])
def test_outside_of_the_mask_every_euler_step_lands_on_the_references_next_latent(inverted, plain, random, reference):
    model, trajectory, noise = inverted
    patched = blend(model, trajectory, reference=reference, seed=4, **LATENTS)
    path = feature_blend.REFERENCES[reference](trajectory, 4)
    latents = walked(patched, noise, random=random)
    assert len(latents) == STEPS + 1
    for ours, theirs in zip(latents, path.latents, strict=True):
        torch.testing.assert_close(ours[BLACK], theirs[BLACK], rtol=1e-4, atol=2e-4)
    assert differs(latents[-1][..., :4], path.latents[-1][..., :4])


def test_after_its_share_of_the_sampling_the_latent_is_free(inverted):
    model, trajectory, noise = inverted
    latents = walked(blend(model, trajectory, **LATENTS | {"blend_latents_until": 0.3}), noise)
    torch.testing.assert_close(latents[1][BLACK], trajectory.latents[1][BLACK], rtol=1e-4, atol=2e-4)
    assert differs(latents[-1][BLACK], trajectory.latents[-1][BLACK])


def test_the_model_is_shown_the_reference_outside(inverted):
    model, trajectory, _ = inverted
    x, seen = tiny_models.latent(seed=5)["samples"], []
    patched = blend(model, trajectory, **LATENTS)
    patched.add_wrapper_with_key(
        "apply_model", "test", lambda run, x, *args, **kw: (seen.append(x), run(x, *args, **kw))[1]
    )
    calls(patched, x, trajectory.sigmas[1], *edits(), GUIDANCE)
    for row in seen[-1]:
        assert torch.equal(row[BLACK], trajectory.latents[1][0][BLACK])
        assert torch.equal(row[..., :4], x[0][..., :4])


@pytest.mark.parametrize(
    "sampler",
    ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "euler_ancestral", "lms", "uni_pc", "ddim", "lcm", "dpmpp_3m_sde"],
)
@pytest.mark.parametrize("random", [False, True], ids=["inverted noise", "random noise"])
def test_whatever_the_sampler_the_latent_ends_as_the_originals(inverted, sampler, random):
    if sampler not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip(f"this host has no {sampler}")
    model, trajectory, noise = inverted
    end = model.model.process_latent_in(
        sample(blend(model, trajectory, **LATENTS), noise, sampler=sampler, random=random)
    )
    torch.testing.assert_close(end[BLACK], trajectory.latents[-1][BLACK], rtol=1e-3, atol=2e-3)
    assert torch.isfinite(end).all()


def test_the_hosts_own_inpainting_mask_wins_where_it_is_black(inverted):
    model, trajectory, _ = inverted
    picture = tiny_models.latent(seed=6)["samples"]
    top = torch.zeros(1, 1, 8, 8)
    top[..., :4, :] = 1
    both = sample(blend(model, trajectory, **LATENTS), picture, random=True, denoise_mask=top)
    torch.testing.assert_close(both[..., 4:, :], picture[..., 4:, :], rtol=1e-4, atol=1e-4)
    end = model.model.process_latent_in(both)
    torch.testing.assert_close(end[..., :4, 4:], trajectory.latents[-1][..., :4, 4:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cells", [2, -2])
def test_a_mask_grows_and_shrinks_by_cells_of_the_latent(inverted, cells):
    mask = feature_apply.grown(half(64), cells, (8, 8))
    assert mask.shape == (1, 64, 64)
    assert mask[0, 0].sum() == 32 + cells * 8


# ---- rows


def test_one_original_serves_any_batch(inverted):
    model, trajectory, noise = inverted
    settings = {"mask": half(), "alpha_inside": 0.8, "blend_latents_until": 0.5, "layers": EVERYTHING}
    for features in ("cached", "same step"):
        patched = blend(model, trajectory, features=features, **settings)
        three = sample(patched, noise.expand(3, -1, -1, -1))
        torch.testing.assert_close(three, sample(patched, noise).expand(3, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", ["cached", "same step"])
def test_a_batch_of_originals_goes_each_to_its_own_picture(features):
    model, two = tiny_models.unet(), tiny_models.latent(2)
    masks = torch.cat([half(), 1 - half()])
    settings = {"layers": EVERYTHING, "alpha_inside": 0.8, "blend_latents_until": 0.5, "features": features}
    trajectory, noise = invert(model, two, original())
    together = sample(blend(model, trajectory, mask=masks, **settings), noise)
    for i in range(2):
        one = dataclasses.replace(trajectory, latents=trajectory.latents[:, i : i + 1])
        alone = sample(blend(model, one, mask=masks[i : i + 1], **settings), noise[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_batches_and_sizes_that_do_not_fit_are_refused(inverted):
    model, _, noise = inverted
    trajectory, _ = invert(model, tiny_models.latent(2), original())
    with pytest.raises(ValueError, match="trajectory holds 2 pictures, the sampled batch has 3"):
        sample(blend(model, trajectory, alpha_inside=0.5), noise.expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="recorded for a latent of 8 x 8, sampling runs at 12 x 8"):
        sample(blend(model, inverted[1], alpha_inside=0.5), torch.zeros(1, 4, 8, 12), random=True)
    with pytest.raises(ValueError, match="the mask has 3 pictures, the batch has 1"):
        sample(blend(model, inverted[1], mask=half().expand(3, -1, -1)), noise)


def test_other_architectures_are_refused(inverted):
    with pytest.raises(ValueError, match="another model architecture"):
        blend(tiny_models.unet("sdxl"), inverted[1], original("sdxl"), alpha_inside=0.5)


@pytest.mark.parametrize("features", ["cached", "same step"])
@pytest.mark.parametrize("sizes", [(8, 8), (9, 13)])
def test_cond_and_uncond_alone_or_together_and_of_any_length_are_blended_alike(features, sizes):
    model = tiny_models.unet()
    trajectory, noise = invert(model, tiny_models.latent(1, *sizes), original())
    patched = blend(model, trajectory, mask=half(), layers=EVERYTHING, features=features)
    positive, negative = edits()
    together = sample(patched, noise, positive, negative)
    apart = tiny_models.prompt(2, tokens=7)
    patched.model_options["disable_cfg1_optimization"] = True
    guided = sample(patched, noise, positive, apart, cfg=1.0)
    unguided = sample(
        blend(model, trajectory, mask=half(), layers=EVERYTHING, features=features), noise, positive, cfg=1.0
    )
    torch.testing.assert_close(guided, unguided, rtol=1e-4, atol=1e-4)
    longer = [[torch.cat([negative[0][0]] * 5, 1), {}]]  # 35 tokens against 7 cannot be concatenated: two calls
    assert differs(sample(patched, noise, positive, longer), torch.zeros_like(together))


def test_dual_guidance_numbers_its_prompts_otherwise(inverted):
    model, trajectory, noise = inverted
    patched = blend(model, trajectory, layers=EVERYTHING, alpha_inside=0.0, features="same step")
    guider = tiny_models.execute(
        DualCFGGuider, model=patched, cond1=edits()[0], cond2=tiny_models.prompt(4), negative=edits()[1],
        cfg_conds=5.0, cfg_cond2_negative=3.0, style="regular",
    )[0]  # fmt: skip
    sampler, sigmas = comfy.samplers.ksampler("euler"), torch.tensor(trajectory.sigmas)
    latent = guider.sample(torch.zeros_like(noise), noise, sampler, sigmas, disable_pbar=True, seed=0)
    alone = sample(patched, noise)
    torch.testing.assert_close(latent, alone, rtol=1e-4, atol=1e-4)


def in_area(prompt, x, y, width, height):
    inputs = {"conditioning": prompt, "x": x, "y": y, "width": width, "height": height, "strength": 1.0}
    return tiny_models.execute(nodes.ConditioningSetArea, **inputs)[0]


@pytest.mark.parametrize("features", ["cached", "same step"])
def test_a_prompt_in_an_area_is_given_its_part_of_reference_and_mask(inverted, features):
    model, trajectory, _ = inverted
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(2))
    patched = blend(model, trajectory, layers="output 3", mask=mask, features=features)
    x, sigma = tiny_models.latent(seed=5)["samples"], trajectory.sigmas[0]
    area = in_area(edits()[0], 32, 8, 24, 40)
    with SeenInputs(model) as looked:
        calls(model, trajectory.latents[0], sigma, original())
        calls(model, x, sigma, area)
        calls(patched, x, sigma, area)
    reference, untouched, blended = ([p[("output", 3)] for p in looked.passes()][i] for i in (0, 1, -1))
    place = (..., slice(1, 6), slice(4, 7))
    expected = torch.lerp(reference[:, :32][place], untouched[:, :32], mask[:, None][place])
    torch.testing.assert_close(blended[:, :32], expected, rtol=1e-4, atol=1e-5)


def test_the_whole_picture_beside_an_area_in_one_batch(inverted):
    model, trajectory, noise = inverted
    positive = [*edits()[0], *in_area(tiny_models.prompt(6), 16, 24, 40, 24)]
    both = [
        sample(blend(model, trajectory, layers=EVERYTHING, mask=half(), features=features), noise, positive)
        for features in ("cached", "same step")
    ]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (lambda: in_area(original(), 0, 0, 32, 64), "limited to an area"),
        (lambda: [*original(), *tiny_models.prompt(8)], "has 2 parts that act at once"),
    ],
    ids=["area", "combined"],
)
@pytest.mark.parametrize("features", ["cached", "same step"])
def test_a_source_prompt_that_is_not_one_for_the_whole_picture_is_refused(inverted, prompt, said, features):
    model, trajectory, noise = inverted
    with pytest.raises(ValueError, match=said):
        sample(blend(model, trajectory, prompt(), alpha_inside=0.5, features=features), noise)


# ---- other families, other packs


@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION"])
def test_every_prediction_type_walks_the_reference_outside(prediction):
    model = tiny_models.unet(prediction=prediction)
    trajectory, noise = invert(model, tiny_models.latent(), original())
    latents = walked(blend(model, trajectory, layers=EVERYTHING, mask=half(), blend_latents_until=1.0), noise)
    for ours, theirs in zip(latents, trajectory.latents, strict=True):
        torch.testing.assert_close(ours[BLACK], theirs[BLACK], rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("family", ["sd15-instruct", "sd15-inpaint", "sdxl-inpaint"])
def test_models_that_look_at_a_picture_show_the_same_one_to_the_reference(family):
    model, prompt = tiny_models.unet(family), original(family)
    seen = {"concat_latent_image": tiny_models.latent(seed=8)["samples"]}
    if "inpaint" in family:
        seen["concat_mask"] = half()[:, None]
    shown = [[tensor, extra | seen] for tensor, extra in prompt]
    positive, negative = ([[tensor, extra | seen] for tensor, extra in p] for p in edits(family))
    trajectory, _ = invert(model, tiny_models.latent(), shown)
    x, sigma = tiny_models.latent(seed=5)["samples"], trajectory.sigmas[0]
    expected = trajectory.latents[0] - calls(model, trajectory.latents[0], sigma, shown)
    for source, features in ((prompt, "auto"), (shown, "same step"), (shown, "cached")):
        patched = blend(model, trajectory, source, layers=EVERYTHING, alpha_inside=0.0, features=features)
        noise = x - calls(patched, x, sigma, positive, negative, GUIDANCE)
        torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="need its pictures on the source prompt"):
        blend(model, trajectory, prompt, alpha_inside=0.0, features="cached")


def with_controlnet(positive, negative):
    inputs = {"control_net": tiny_models.controlnet(), "image": tiny_models.picture(seed=4), "strength": 0.5}
    return tiny_models.execute(
        nodes.ControlNetApplyAdvanced,
        positive=positive,
        negative=negative,
        start_percent=0.0,
        end_percent=1.0,
        **inputs,
    )


def test_the_reference_is_run_without_the_edits_controlnet(inverted, plain):
    model, trajectory, noise = inverted
    both = with_controlnet(*edits())
    settings = {"layers": EVERYTHING, "mask": half()}
    pictures = [
        sample(blend(model, trajectory, features=features, **settings), noise, *both)
        for features in ("cached", "same step")
    ]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    assert differs(pictures[0], sample(blend(model, trajectory, **settings), noise))
    source, _ = with_controlnet(original(), original())
    for features in ("cached", "same step"):  # one on the source's prompt is left out
        picture = sample(blend(model, trajectory, source, features=features, **settings), noise, *both)
        torch.testing.assert_close(picture, pictures[0], rtol=1e-4, atol=1e-4)


def scale_features(h, skip, options):
    """What FreeU does, in place."""
    h[:, : h.shape[1] // 2] *= 1.4
    return h, skip * 0.8


def scale_input(h, options):
    return h * 1.1


def test_block_patches_of_other_packs_act_before_and_after(inverted, plain):
    model, trajectory, noise = inverted
    settings = {"layers": EVERYTHING, "alpha_inside": 0.5, "features": "same step"}

    def theirs(model):
        patched = model.clone()
        patched.set_model_output_block_patch(scale_features)
        patched.set_model_input_block_patch_after_skip(scale_input)
        return patched

    alone, ours = sample(theirs(model), noise), sample(blend(model, trajectory, **settings), noise)
    for both in (blend(theirs(model), trajectory, **settings), theirs(blend(model, trajectory, **settings))):
        picture = sample(both, noise)
        assert differs(picture, alone) and differs(picture, ours)
    assert torch.equal(sample(model, noise), plain)


@pytest.mark.parametrize("ours_last", [True, False])
def test_a_lora_on_the_model_acts_though_the_end_is_replaced(inverted, plain, ours_last):
    model, trajectory, noise = inverted
    lora = tiny_models.lora(model)
    generator = torch.Generator().manual_seed(3)
    lora |= {
        "diffusion_model.out.2.lora_up.weight": torch.randn(4, 2, 1, 1, generator=generator),
        "diffusion_model.out.2.lora_down.weight": torch.randn(2, 32, 3, 3, generator=generator) * 0.1,
    }
    settings = {"layers": EVERYTHING, "alpha_inside": 0.5, "features": "same step"}

    def theirs(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]

    both = sample(
        blend(theirs(model), trajectory, **settings) if ours_last else theirs(blend(model, trajectory, **settings)),
        noise,
    )
    other = sample(
        theirs(blend(model, trajectory, **settings)) if ours_last else blend(theirs(model), trajectory, **settings),
        noise,
    )
    assert torch.equal(both, other)
    assert differs(both, sample(theirs(model), noise)) and differs(
        both, sample(blend(model, trajectory, **settings), noise)
    )
    assert torch.equal(sample(model, noise), plain)


@pytest.mark.parametrize("features", ["cached", "same step"])
def test_two_feature_blends_hold_two_places_and_do_not_blend_each_others_reference(inverted, features):
    model, trajectory, noise = inverted
    corner = torch.zeros(1, 64, 64)
    corner[:, :32, :32] = 1
    settings = {"layers": EVERYTHING, "features": features}
    first = blend(model, trajectory, mask=half(), **settings)
    both = sample(blend(first, trajectory, mask=corner, **settings), noise)
    assert differs(both, sample(first, noise))
    everywhere = blend(first, trajectory, alpha_inside=0.0, **settings)
    alone = blend(model, trajectory, alpha_inside=0.0, **settings)
    torch.testing.assert_close(sample(everywhere, noise), sample(alone, noise), rtol=1e-4, atol=1e-4)


def test_an_end_that_another_node_replaced_by_something_else_is_refused(inverted):
    model = inverted[0].clone()
    model.add_object_patch("diffusion_model.out", torch.nn.Identity())
    with pytest.raises(ValueError, match="leave 'out' off the layers"):
        blend(model, inverted[1], alpha_inside=0.5)
    blend(model, inverted[1], alpha_inside=0.5, layers="output", features="same step")


# ---- memory, cancelling


def test_the_memory_that_is_stated_is_the_memory_that_is_taken(inverted):
    model, trajectory, _ = inverted
    patched, report = tiny_models.execute(
        FeatureBlend, model=model, trajectory=trajectory, positive=original(), alpha_inside=0.5, blend_latents_until=0.0
    )
    blending = step_of(patched)
    taken = blending.features.bytes
    assert taken == feature_cache.expected_bytes(blending, layering.feature_layers(model), torch.float32)
    assert f"{STEPS} levels, {taken / 1e6:.1f} MB" in report


def test_auto_caches_up_to_a_quarter_of_the_free_memory(inverted, monkeypatch):
    model, trajectory, _ = inverted
    taken = cached(model, trajectory).bytes
    settings = {"layers": EVERYTHING, "alpha_inside": 0.5}
    monkeypatch.setattr(feature_cache, "free_memory", lambda: 4 * taken)
    assert isinstance(step_of(blend(model, trajectory, **settings)).features, feature_cache.Cached)
    monkeypatch.setattr(feature_cache, "free_memory", lambda: 4 * taken - 4)
    assert isinstance(step_of(blend(model, trajectory, **settings)).features, feature_blend.SameStep)
    monkeypatch.setattr(feature_cache, "free_memory", lambda: taken - 1)
    with pytest.raises(ValueError, match="set features to 'same step'"):
        blend(model, trajectory, features="cached", **settings)


def test_nothing_of_a_run_is_left_behind(inverted):
    model, trajectory, noise = inverted
    patched = blend(model, trajectory, layers=EVERYTHING, alpha_inside=0.5, features="same step")
    sample(patched, noise)
    assert not [key for key in patched.model_options["transformer_options"] if "palimpsest" in str(key)]
    assert feature_blend.OPTIONS.get() is None


@pytest.mark.parametrize("where", ["recording", "sampling"])
def test_a_cancelled_run_leaves_the_model_as_it_was(inverted, plain, where):
    model, trajectory, noise = inverted

    def interrupt(*_):
        comfy.model_management.interrupt_current_processing()

    if where == "sampling":
        patched = blend(model, trajectory, layers=EVERYTHING, alpha_inside=0.5, features="same step")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        if where == "sampling":
            sample(patched, noise, callback=interrupt)
        else:
            settings = feature_apply.BlendSettings(0.5, 0.5, lambda layers: layers)
            feature_apply.apply(model, trajectory, original(), settings, features="cached", callback=interrupt)
    assert torch.equal(sample(model, noise), plain)


# ---- the published code's quirks


def test_quirks_blend_the_middle_with_what_the_middle_returned(inverted):
    model, trajectory, _ = inverted
    patched = blend(model, trajectory, layers="middle", alpha_inside=0.25, paper_code_quirks=True)
    x, sigma = tiny_models.latent(seed=5)["samples"], trajectory.sigmas[1]
    with SeenInputs(model) as looked:
        calls(model, trajectory.latents[1], sigma, original())
        calls(model, x, sigma, *edits(), GUIDANCE)
        calls(patched, x, sigma, *edits(), GUIDANCE)
    reference, untouched, blended = (looked.passes()[i] for i in (0, 1, -1))
    returned = reference["output", 0][:, : untouched["middle", 0].shape[1]]
    expected = torch.lerp(returned, untouched["middle", 0], 0.25)
    torch.testing.assert_close(blended["middle", 0], expected, rtol=1e-4, atol=1e-5)


def test_quirks_hold_the_level_just_left_and_begin_one_level_late(inverted):
    model, trajectory, noise = inverted
    found = []
    patched = blend(model, trajectory, paper_code_quirks=True, **LATENTS)
    sample(patched, noise, callback=lambda step, denoised, x, total: found.append(x.clone()))
    levels, latents = trajectory.sigmas, trajectory.latents
    assert len(found) == STEPS - 1
    torch.testing.assert_close(found[0], rescale_to_level(latents[0], *levels[:2]), rtol=1e-4, atol=1e-4)
    left = rescale_to_level(latents[1], *levels[1:3])
    torch.testing.assert_close(found[1][BLACK], left[BLACK], rtol=1e-4, atol=1e-4)


def test_quirks_leave_a_start_from_random_noise_at_its_level(inverted):
    model, trajectory, noise = inverted
    found = []
    patched = blend(model, trajectory, paper_code_quirks=True, **LATENTS)
    sample(patched, noise, random=True, callback=lambda step, denoised, x, total: found.append(x.clone()))
    assert len(found) == STEPS


# ---- learning


def tune(model, trajectory, **settings):
    """(weights, plot, report)."""
    positive, negative = edits("sdxl" if model.model.diffusion_model.num_classes else "sd15")
    inputs = {"target_positive": positive, "negative": negative, "positive": original(), "steps": 12} | settings
    return tiny_models.execute(TuneFeatureBlend, model=model, trajectory=trajectory, **inputs)


@pytest.mark.parametrize(("keep_edit", "towards"), [(0.0, -1), (20.0, 1)], ids=["rebuild", "keep"])
@pytest.mark.parametrize("mask", [None, half()], ids=["everywhere", "mask"])
def test_alphas_fall_to_the_original_or_rise_to_the_edit(inverted, plain, keep_edit, towards, mask):
    model, trajectory, noise = inverted
    weights, _, report = tune(model, trajectory, keep_edit=keep_edit, mask=mask)
    moved = [(alpha - 0.5) * towards for alpha in weights.alphas.values()]
    assert sum(moved) / len(moved) > 0.05 and "learned output 0" in report
    assert all(0 < alpha < 1 for alpha in weights.alphas.values())
    assert torch.equal(sample(model, noise), plain)


def test_more_steps_lower_the_loss(inverted):
    """Along a fine inversion: a coarse one's straight lines are not what the network draws, whatever is blended."""
    model = inverted[0]
    trajectory, _ = invert(model, tiny_models.latent(), original(), steps=10)
    losses = tune(model, trajectory, steps=30, keep_edit=0.0)[0].info["losses"]
    assert len(losses) == 30
    assert sum(losses[-10:]) < sum(losses[:10])  # each ten steps meet every level once


def test_tuning_repeats_itself_by_its_seed(inverted):
    model, trajectory, _ = inverted
    one, two, other = (tune(model, trajectory, seed=seed, adversarial=0.1)[0].alphas for seed in (1, 1, 2))
    assert one == two != other


def test_the_gradient_of_alpha_is_that_of_the_loss(inverted):
    """By finite differences through the sampler, guidance and blending."""
    from palimpsest.nodes.feature_blend import tuning

    model, trajectory, _ = inverted
    names, shift, found = ["output 1", "output 3"], 0.02, {}

    class Once(tuning.FitAlphas):
        """The loss at one level, for raw values moved by hand, and its gradient."""

        def __call__(self, run, x, sigmas, extra_args, callback, disable=False, **_):
            here, there = (trajectory.latents[i].to(x).clone() for i in (1, 2))
            level, white = x.new_full((1,), trajectory.sigmas[1]), x.new_ones(1, 1, 8, 8)

            def predict(x, sigma):
                return run(x, sigma, **extra_args)

            edit = self.plain_edit(predict, here, level)
            source = maths.straight_line_denoised(here, there, *trajectory.sigmas[1:3])

            def loss():
                rebuilt, kept = maths.tuning_losses(predict(here, level), source, edit, white, white)
                return rebuilt + 0.3 * kept

            loss().backward()
            for key, raw in self.alphas.raw.items():
                with torch.no_grad():
                    ends = []
                    for sign in (1, -1):
                        raw.add_(sign * shift)
                        ends.append(float(loss()))
                        raw.sub_(sign * shift)
                found[key] = float(raw.grad), (ends[0] - ends[1]) / (2 * shift)
            return x

    original_fit, tuning.FitAlphas = tuning.FitAlphas, Once
    try:
        tune(model, trajectory, layers=", ".join(names))
    finally:
        tuning.FitAlphas = original_fit
    assert len(found) == 2
    for gradient, difference in found.values():
        assert gradient == pytest.approx(difference, rel=0.03, abs=1e-5)


@pytest.mark.parametrize("layers", ["out", "middle", "input 1-2", EVERYTHING])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_any_feature_of_any_family_learns(family, layers):
    model = tiny_models.unet(family)
    trajectory, _ = invert(model, tiny_models.latent(), original(family))
    weights = tune(model, trajectory, positive=original(family), layers=layers, steps=1)[0]
    assert "input 1" not in weights.alphas  # no prompt has acted there
    assert all(alpha != 0.5 for alpha in weights.alphas.values())


def test_pictures_of_a_batch_share_their_weights_and_a_controlnet_may_guide_the_edit():
    model = tiny_models.unet()
    trajectory, _ = invert(model, tiny_models.latent(2), original())
    positive, negative = with_controlnet(*edits())
    weights = tune(model, trajectory, target_positive=positive, negative=negative, steps=1, layers=EVERYTHING)[0]
    assert all(alpha != 0.5 for alpha in weights.alphas.values())


def test_the_features_may_be_made_at_the_same_step(inverted, monkeypatch):
    model, trajectory, _ = inverted
    by_cache = tune(model, trajectory, steps=3)[0]
    monkeypatch.setattr(feature_cache, "free_memory", lambda: 0)
    by_step = tune(model, trajectory, steps=3)[0]
    assert "same step" in by_step.info["features"] and "cached" in by_cache.info["features"]
    assert list(by_step.alphas.values()) == pytest.approx(list(by_cache.alphas.values()), abs=1e-3)


def test_tuning_copies_no_weights_and_leaves_no_trace(inverted):
    model, trajectory, _ = inverted
    sample(model, inverted[2])
    places = {name: p.data_ptr() for name, p in model.model.named_parameters()}
    out = model.model.diffusion_model.out
    tune(model, trajectory, steps=2)
    assert {name: p.data_ptr() for name, p in model.model.named_parameters()} == places
    sample(model, inverted[2])
    assert model.model.diffusion_model.out is out
    assert all(p.grad is None for p in model.model.parameters())


def test_tuning_can_be_cancelled(inverted, plain, monkeypatch):
    model, trajectory, noise = inverted
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", raise_at(20 * STEPS))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tune(model, trajectory, steps=10**4)
    monkeypatch.undo()
    assert torch.equal(sample(model, noise), plain)


def raise_at(count):
    """A function that raises the host's interruption when it was called so often."""
    left = [count]

    def check():
        left[0] -= 1
        if left[0] < 0:
            raise comfy.model_management.InterruptProcessingException

    return check


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask": torch.zeros(1, 8, 8)}, "one colour all over"),
        ({"negative": None}, "needs the negative prompt"),
        ({"layers": "decoder"}, "is not a feature"),
        ({"layers": "input 1"}, "there is nothing to learn"),
    ],
)
def test_tunings_that_cannot_be_are_refused(inverted, settings, said):
    with pytest.raises(ValueError, match=said):
        tune(*inverted[:2], **settings)


def test_learned_weights_replace_layers_and_alphas(inverted):
    model, trajectory, noise = inverted
    layout = trajectory.layout
    weights = BlendWeights({"middle": 0.5, "output 2": 0.5}, layout)
    ours = sample(blend(model, trajectory, blend_weights=weights), noise)
    by_hand = sample(blend(model, trajectory, layers="middle, output 2", alpha_inside=0.5), noise)
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-5)
    for wrong, said in (
        (BlendWeights({"middle": 0.5}, "another"), "tuned on another model architecture"),
        (BlendWeights({"output 11": 0.5}, layout), "does not have .output 11."),
    ):
        with pytest.raises(ValueError, match=said):
            blend(model, trajectory, blend_weights=wrong)


def test_the_plot_shows_a_bar_for_every_feature(inverted):
    _, plot, _ = tune(*inverted[:2], steps=1, layers=EVERYTHING)
    assert plot.shape[0] == 1 and plot.shape[3] == 3 and 0 <= plot.min() < plot.max() <= 1
    shorter = tune(*inverted[:2], steps=3, layers="out")[1]
    assert shorter.shape[1] < plot.shape[1]


# ---- files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The host's folder list with an empty folder of ours."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, files.SHELF.folder, ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    return tmp_path


WEIGHTS = BlendWeights({"output 0": 0.25, "out": 0.75}, "0123456789abcdef", {"losses": [2.0, 1.0], "steps": 2})


def test_weights_come_back_from_a_file(folder):
    (name,) = tiny_models.execute(SaveBlendWeights, blend_weights=WEIGHTS, filename="../my: garden")
    assert name == "my garden_00001.safetensors" and (folder / name).exists()
    assert tiny_models.execute(SaveBlendWeights, blend_weights=WEIGHTS, filename="my garden")[0].endswith(
        "_00002.safetensors"
    )
    loaded, report = tiny_models.execute(LoadBlendWeights, file=name)
    assert loaded == WEIGHTS and "output 0 0.25, out 0.75" in report
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"] * 2
    assert name in files.listed()


def test_a_name_without_letters_is_refused(folder):
    with pytest.raises(ValueError, match="has no letters or digits"):
        files.new_path("../..")


def saved(folder, alphas=None, **header):
    """A file with some of its header or its tensor changed."""
    from safetensors.torch import save_file

    usual = {"format": files.SHELF.format, "version": "1", "features": '["out"]', "layout": "x", "info": "{}"}
    path = folder / "a.safetensors"
    metadata = {key: value for key, value in (usual | header).items() if value is not None}
    save_file({"alpha": torch.tensor([0.5]) if alphas is None else alphas}, path, metadata=metadata)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": None}, "not a file of blend weights"),
        ({"format": "palimpsest.kv"}, "not a file of blend weights"),
        ({"version": "0"}, "an early version of this pack"),
        ({"version": "2"}, "a newer version of this pack"),
        ({"features": '["out", "middle"]'}, "do not fit its list"),
        ({"features": "[out"}, "damaged"),
        ({"layout": None}, "damaged"),
        ({"alphas": torch.tensor([1.5])}, "outside of 0 to 1"),
        ({"alphas": torch.tensor([float("nan")])}, "outside of 0 to 1"),
    ],
)
def test_foreign_newer_and_damaged_files_are_refused(folder, changes, said):
    with pytest.raises(ValueError, match=said):
        files.load(saved(folder, **changes))


def test_a_cut_off_file_is_refused(folder):
    path = saved(folder)
    content = Path(path).read_bytes()
    for length in (0, 7, len(content) // 2, len(content) - 1):
        Path(path).write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut off or damaged"):
            files.load(path)


# ---- schema


@pytest.mark.parametrize("node", [FeatureBlend, TuneFeatureBlend, SaveBlendWeights, LoadBlendWeights])
def test_every_input_and_output_says_what_it_does(node):
    schema = node.define_schema()
    assert schema.description.endswith(".")
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip and entry.tooltip.endswith(".")


def test_presets_are_named_as_in_the_papers():
    (preset,) = (entry for entry in FeatureBlend.define_schema().inputs if entry.id == "preset")
    assert preset.options == ["custom", "paper", "PFB-Diff object", "PFB-Diff background"]


def test_a_prompt_other_than_the_inversions_is_noted(inverted):
    _, report = tiny_models.execute(
        FeatureBlend, model=inverted[0], trajectory=inverted[1], positive=tiny_models.prompt(8), alpha_inside=0.5
    )
    assert "the prompt differs from the one the picture was inverted with" in report
    assert "no mask, so latents are not blended" in report
