"""Feature Blend in the host's own classes: what is blended where, and that nothing else is touched."""

import dataclasses

import comfy.model_management
import comfy.samplers
import pytest
import tiny_models
import torch
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from feature_blend.blending import (
    EVERYTHING,
    GUIDANCE,
    STEPS,
    SeenInputs,
    acting,
    beside,
    blend,
    cached,
    calls,
    differs,
    edits,
    half,
    in_area,
    invert,
    original,
    sample,
    source_of,
)
from palimpsest.nodes import host
from palimpsest.nodes.feature_blend import apply as feature_apply
from palimpsest.nodes.feature_blend import layers as layering
from palimpsest.nodes.feature_blend import patches, tuning
from palimpsest.nodes.feature_blend.nodes import FeatureBlend, LoadBlendWeights, SaveBlendWeights, TuneFeatureBlend
from palimpsest.nodes.host import reference
from palimpsest.nodes.settings import Settings

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
        ("decoder", "'decoder' names no layer"),
        ("output 12", "no 'output 12'; its features are output 0 to 11"),
        ("input 0-3", "input of input block 0 is the latent"),
        ("output 5-3", "no 'output 5-3'"),
        ("output 3.1", "'output 3.1' names a layer inside of a block"),
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
    assert [level.shapes for level in recorded.levels] == [expected]


# ---- what is blended


@pytest.mark.parametrize("features", ["cached", "same step"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_with_alpha_0_everywhere_the_noise_is_the_sources_own(family, features):
    model, prompt = tiny_models.unet(family), original(family)
    trajectory, _ = invert(model, tiny_models.latent(), prompt)
    patched = blend(model, trajectory, prompt, layers=EVERYTHING, alpha_inside=0.0, source_features=features)
    for i in range(STEPS):
        edit = beside(trajectory, i)
        sigma, x = trajectory.sigmas[i], trajectory.latents[i]
        expected = x - calls(model, x, sigma, prompt)
        noise = edit - calls(patched, edit, sigma, *edits(family), GUIDANCE)
        torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-4)


def features_by_name(layers):
    return [str(layer) for layer in layers]


@pytest.mark.parametrize("features", ["cached", "same step"])
@pytest.mark.parametrize("name", ["input 1", "input 2", "input 3", "middle", "output 0", "output 2", "output 3", "out"])
def test_a_feature_is_the_input_of_its_block_and_skips_stay_the_edits(inverted, name, features):
    model, trajectory, _ = inverted
    (layer,) = layering.parse(name, layering.feature_layers(model))
    patched = blend(model, trajectory, layers=name, alpha_inside=0.25, source_features=features)
    x, sigma = beside(trajectory, 1), trajectory.sigmas[1]
    with SeenInputs(model) as looked:
        calls(model, trajectory.latents[1], sigma, original())
        calls(model, x, sigma, *edits(), GUIDANCE)
        calls(patched, x, sigma, *edits(), GUIDANCE)
    source, untouched, *_, blended = looked.passes()
    key, channels = layer.key, layer.channels
    expected = torch.lerp(source[key][:, :channels], untouched[key][:, :channels], 0.25)
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
    x, sigma = beside(trajectory, 0), trajectory.sigmas[0]
    with SeenInputs(model) as looked:
        calls(model, trajectory.latents[0], sigma, original())
        calls(model, x, sigma, *edits(), GUIDANCE)
        calls(patched, x, sigma, *edits(), GUIDANCE)
    source, untouched, blended = ([p[("output", 3)] for p in looked.passes()][i] for i in (0, 1, -1))
    weight = torch.full((8, 8), 0.125)
    weight[:, :4] = value * 0.75 + (1 - value) * 0.125
    channels = 32
    expected = torch.lerp(source[:, :channels].expand(2, -1, -1, -1), untouched[:, :channels], weight)
    torch.testing.assert_close(blended[:, :channels], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("name", ["middle, output 1", EVERYTHING])
def test_cached_features_are_those_of_the_same_step(inverted, plain, name, sampler):
    model, trajectory, noise = inverted
    settings = {"layers": name, "alpha_inside": 0.5}
    both = [
        sample(blend(model, trajectory, source_features=features, **settings), noise, sampler=sampler)
        for features in ("cached", "same step")
    ]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
    assert differs(both[0], plain)


def test_between_recorded_levels_the_latents_are_interpolated_and_cached_features_the_nearest(inverted):
    model, trajectory, noise = inverted
    middle = (trajectory.sigmas[0] + trajectory.sigmas[1]) / 2
    torch.testing.assert_close(host.latents_at(trajectory, middle), (trajectory.latents[0] + trajectory.latents[1]) / 2)
    for i, sigma in enumerate(trajectory.sigmas):
        assert torch.equal(host.latents_at(trajectory, sigma), trajectory.latents[i])
    above = host.latents_at(trajectory, 2 * trajectory.sigmas[0])
    torch.testing.assert_close(above, 2 * trajectory.latents[0] - trajectory.latents[-1], rtol=1e-5, atol=1e-4)
    for features in ("cached", "same step"):
        patched = blend(model, trajectory, source_features=features, alpha_inside=0.5)
        assert differs(sample(patched, noise, steps=5), noise)


def test_outside_of_its_percents_nothing_is_blended(inverted, plain):
    model, trajectory, noise = inverted
    recorded = source_of(blend(model, trajectory, alpha_inside=0.0, end_percent=0.3, source_features="cached"))
    assert (
        len(recorded.levels)
        == sum(s > model.model.model_sampling.percent_to_sigma(0.3) for s in trajectory.sigmas)
        < STEPS
    )
    early = sample(blend(model, trajectory, alpha_inside=0.0, end_percent=0.3), noise)
    late = sample(blend(model, trajectory, alpha_inside=0.0, start_percent=0.3), noise)
    always = sample(blend(model, trajectory, alpha_inside=0.0), noise)
    assert differs(early, plain) and differs(late, plain) and differs(early, always) and differs(late, always)


def test_a_window_without_a_level_is_refused(inverted):
    with pytest.raises(ValueError, match="no level of the trajectory lies between"):
        blend(*inverted[:2], alpha_inside=0.5, start_percent=0.98, end_percent=0.99)
    for end in (0.2, 0.5):
        with pytest.raises(ValueError, match=rf"start_percent 0\.5 and end_percent {end:g} leave no step between"):
            blend(*inverted[:2], alpha_inside=0.5, start_percent=0.5, end_percent=end)


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
    patched = blend(model, trajectory, layers=EVERYTHING, alpha_inside=0.5, source_features="same step")
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


# ---- rows


def test_one_source_serves_any_batch(inverted):
    model, trajectory, noise = inverted
    settings = {"mask": half(), "alpha_inside": 0.8, "blend_latents_until": 0.5, "layers": EVERYTHING}
    for features in ("cached", "same step"):
        patched = blend(model, trajectory, source_features=features, **settings)
        three = sample(patched, noise.expand(3, -1, -1, -1))
        torch.testing.assert_close(three, sample(patched, noise).expand(3, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", ["cached", "same step"])
def test_a_batch_of_sources_goes_each_to_its_own_picture(features):
    model, two = tiny_models.unet(), tiny_models.latent(2)
    masks = torch.cat([half(), 1 - half()])
    settings = {"layers": EVERYTHING, "alpha_inside": 0.8, "blend_latents_until": 0.5, "source_features": features}
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
    patched = blend(model, trajectory, mask=half(), layers=EVERYTHING, source_features=features)
    positive, negative = edits()
    together = sample(patched, noise, positive, negative)
    apart = tiny_models.prompt(2, tokens=7)
    patched.model_options["disable_cfg1_optimization"] = True
    guided = sample(patched, noise, positive, apart, cfg=1.0)
    unguided = sample(
        blend(model, trajectory, mask=half(), layers=EVERYTHING, source_features=features), noise, positive, cfg=1.0
    )
    torch.testing.assert_close(guided, unguided, rtol=1e-4, atol=1e-4)
    longer = [[torch.cat([negative[0][0]] * 5, 1), {}]]  # 35 tokens against 7 cannot be concatenated: two calls
    assert differs(sample(patched, noise, positive, longer), torch.zeros_like(together))


def test_dual_guidance_numbers_its_prompts_otherwise(inverted):
    model, trajectory, noise = inverted
    patched = blend(model, trajectory, layers=EVERYTHING, alpha_inside=0.0, source_features="same step")
    guider = tiny_models.execute(
        DualCFGGuider, model=patched, cond1=edits()[0], cond2=tiny_models.prompt(4), negative=edits()[1],
        cfg_conds=5.0, cfg_cond2_negative=3.0, style="regular",
    )[0]  # fmt: skip
    sampler, sigmas = comfy.samplers.ksampler("euler"), torch.tensor(trajectory.sigmas)
    latent = guider.sample(torch.zeros_like(noise), noise, sampler, sigmas, disable_pbar=True, seed=0)
    alone = sample(patched, noise)
    torch.testing.assert_close(latent, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", ["cached", "same step"])
def test_a_prompt_in_an_area_is_given_its_part_of_source_and_mask(inverted, features):
    model, trajectory, _ = inverted
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(2))
    patched = blend(model, trajectory, layers="output 3", mask=mask, source_features=features)
    x, sigma = beside(trajectory, 0), trajectory.sigmas[0]
    area = in_area(edits()[0], 32, 8, 24, 40)
    with SeenInputs(model) as looked:
        calls(model, trajectory.latents[0], sigma, original())
        calls(model, x, sigma, area)
        calls(patched, x, sigma, area)
    source, untouched, blended = ([p[("output", 3)] for p in looked.passes()][i] for i in (0, 1, -1))
    place = (..., slice(1, 6), slice(4, 7))
    expected = torch.lerp(source[:, :32][place], untouched[:, :32], mask[:, None][place])
    torch.testing.assert_close(blended[:, :32], expected, rtol=1e-4, atol=1e-5)


def test_the_whole_picture_beside_an_area_in_one_batch(inverted):
    model, trajectory, noise = inverted
    positive = [*edits()[0], *in_area(tiny_models.prompt(6), 16, 24, 40, 24)]
    both = [
        sample(blend(model, trajectory, layers=EVERYTHING, mask=half(), source_features=features), noise, positive)
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
        sample(blend(model, trajectory, prompt(), alpha_inside=0.5, source_features=features), noise)


# ---- memory, cancelling


def test_the_memory_that_is_stated_is_the_memory_that_is_taken(inverted):
    model, trajectory, _ = inverted
    patched, report = tiny_models.execute(
        FeatureBlend, model=model, trajectory=trajectory, positive=original(), alpha_inside=0.5, blend_latents_until=0.0
    )
    taken = source_of(patched).bytes
    assert taken == reference.expected_bytes(model, acting(patched).wanted)
    assert f"{STEPS} levels, {taken / 1e6:.1f} MB" in report


def test_auto_caches_up_to_a_quarter_of_the_free_memory(inverted, monkeypatch):
    model, trajectory, _ = inverted
    taken = cached(model, trajectory).bytes
    settings = {"layers": EVERYTHING, "alpha_inside": 0.5}
    monkeypatch.setattr(reference, "free_memory", lambda: 4 * taken)
    assert isinstance(source_of(blend(model, trajectory, **settings)), reference.Cached)
    monkeypatch.setattr(reference, "free_memory", lambda: 4 * taken - 4)
    assert isinstance(source_of(blend(model, trajectory, **settings)), reference.SameStep)
    monkeypatch.setattr(reference, "free_memory", lambda: taken - 1)
    with pytest.raises(ValueError, match="set source_features to 'same step'"):
        blend(model, trajectory, source_features="cached", **settings)


def test_nothing_of_a_run_is_left_behind(inverted):
    model, trajectory, noise = inverted
    patched = blend(model, trajectory, layers=EVERYTHING, alpha_inside=0.5, source_features="same step")
    sample(patched, noise)
    assert not [key for key in patched.model_options["transformer_options"] if "palimpsest" in str(key)]
    assert patches.OPTIONS.get() is None


@pytest.mark.parametrize("where", ["recording", "sampling"])
def test_a_cancelled_run_leaves_the_model_as_it_was(inverted, plain, where):
    model, trajectory, noise = inverted

    def interrupt(*_):
        comfy.model_management.interrupt_current_processing()

    if where == "sampling":
        patched = blend(model, trajectory, layers=EVERYTHING, alpha_inside=0.5, source_features="same step")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        if where == "sampling":
            sample(patched, noise, callback=interrupt)
        else:
            settings = feature_apply.BlendSettings(alpha_inside=0.5, layers=EVERYTHING, source_features="cached")
            feature_apply.apply(model, trajectory, original(), settings, callback=interrupt)
    assert torch.equal(sample(model, noise), plain)


# ---- schema


@pytest.mark.parametrize("node", [FeatureBlend, TuneFeatureBlend, SaveBlendWeights, LoadBlendWeights])
def test_every_input_and_output_says_what_it_does(node):
    schema = node.define_schema()
    assert schema.description.endswith(".")
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip and entry.tooltip.endswith(".")


DIFFERENT = {
    "alpha_inside": 0.9, "alpha_outside": 0.1, "layers": "middle", "start_percent": 0.2, "end_percent": 0.7,
    "blend_latents_until": 0.6, "source_latents": "re-noised source", "source_features": "same step",
    "released_code": True, "grow_mask": 1.5, "seed": 11,
}  # fmt: skip
TUNED = {
    "layers": "out", "steps": 7, "learning_rate": 0.2, "guidance": 4.0, "keep_edit": 1.5, "adversarial": 0.3, "seed": 5,
    "pairs_per_step": 3,
}  # fmt: skip


def arrived(monkeypatch, module, function, node, **inputs):
    """The settings with which a node calls a function of its technique, by name."""
    found = []

    def stop(*args, **named):
        found.extend([each for each in args if isinstance(each, Settings)])
        raise StopIteration

    monkeypatch.setattr(module, function, stop)
    with pytest.raises(StopIteration):
        tiny_models.execute(node, **inputs)
    return found[0].named()


@pytest.mark.parametrize(
    ("preset", "replaced"),
    [
        ("custom", {}),
        ("paper", {"alpha_inside": 0.5, "alpha_outside": 0.5, "start_percent": 0.0, "end_percent": 1.0,
                   "blend_latents_until": 0.0, "grow_mask": 0.0}),
        ("PFB-Diff object", {"alpha_inside": 1.0, "alpha_outside": 0.0, "start_percent": 0.0, "end_percent": 1.0,
                             "blend_latents_until": 0.5, "grow_mask": 0.0}),
        ("PFB-Diff background", {"alpha_inside": 1.0, "alpha_outside": 0.0, "start_percent": 0.0, "end_percent": 0.8,
                                 "blend_latents_until": 0.2, "grow_mask": -2.25}),
    ],
)  # fmt: skip
def test_every_value_of_the_node_arrives_under_its_own_name(inverted, monkeypatch, preset, replaced):
    inputs = {"model": inverted[0], "trajectory": inverted[1], "positive": original()}
    found = arrived(monkeypatch, feature_apply, "apply", FeatureBlend, preset=preset, **inputs, **DIFFERENT)
    layers = {} if preset == "custom" else {"layers": preset}
    assert found == DIFFERENT | replaced | layers


def test_every_value_of_the_tuning_arrives_under_its_own_name(inverted, monkeypatch):
    prompts = {"positive": original(), "target_positive": edits()[0], "negative": edits()[1]}
    inputs = {"model": inverted[0], "trajectory": inverted[1], **prompts}
    assert arrived(monkeypatch, tuning, "tune", TuneFeatureBlend, **inputs, **TUNED) == TUNED


def test_defaults_of_the_settings_are_those_of_the_node():
    for node, settings in ((FeatureBlend, feature_apply.BlendSettings), (TuneFeatureBlend, tuning.TuneSettings)):
        entries = {entry.id: entry for entry in node.define_schema().inputs}
        for name, default in settings().named().items():
            entry = entries[name]
            assert (entry.default if entry.default is not None else entry.options[0]) == default, name


def test_presets_are_named_as_in_the_papers():
    (preset,) = (entry for entry in FeatureBlend.define_schema().inputs if entry.id == "preset")
    assert preset.options == ["custom", "paper", "PFB-Diff object", "PFB-Diff background"]


def test_a_prompt_other_than_the_inversions_is_noted(inverted):
    _, report = tiny_models.execute(
        FeatureBlend, model=inverted[0], trajectory=inverted[1], positive=tiny_models.prompt(8), alpha_inside=0.5
    )
    assert "the prompt differs from the one the picture was inverted with" in report
    assert "no mask, so latents are not blended" in report
