"""Apply Text Control in the host: it acts as a ControlNet does, and edits what it is given."""

import harness
import pytest
import tiny_models
import torch
from palimpsest.kernels.text_control import GREY
from palimpsest.nodes.text_control.applying import hint_of
from palimpsest.nodes.text_control.control import Hint, Layout
from palimpsest.nodes.text_control.nodes import ApplyTextControl
from text_control.writing import control, lines

import nodes as host_nodes

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def model():
    return tiny_models.unet()


@pytest.fixture(scope="module")
def written(model):
    return control(model)


def apply(control_net, text_lines=None, prompts=None, **given):
    """(positive, negative, latent, mask)."""
    positive, negative = prompts or harness.edits()
    return tiny_models.execute(
        ApplyTextControl,
        positive=positive,
        negative=negative,
        control_net=control_net,
        text_lines=lines() if text_lines is None else text_lines,
        vae=tiny_models.AveragingVAE(),
        **given,
    )


def sampled(model, control_net, text_lines=None, **given):
    positive, negative, latent, _ = apply(control_net, text_lines, **given)
    size = latent["samples"].shape
    added = harness.noise(*size[2:], pictures=size[0])
    mask = latent.get("noise_mask")
    return harness.sample(model, latent["samples"], positive, negative, noise=added, denoise_mask=mask)


def plain(model, size=(8, 8)):
    return harness.sample_noise(model, harness.noise(*size))


# ---- it acts as a ControlNet does


def test_it_acts_and_other_letters_are_another_picture(model, written):
    before = plain(model)
    found = sampled(model, written)
    harness.assert_acts(found, before)
    harness.assert_acts(sampled(model, written, lines(seed=5)), found)
    assert torch.equal(plain(model), before)


def test_strength_0_and_zero_convolutions_change_nothing(model, written):
    positive, negative = harness.edits()
    given = apply(written, prompts=(positive, negative), strength=0.0)
    assert given[0] is positive or "control" not in given[0][0][1]
    assert torch.equal(sampled(model, written, strength=0.0), plain(model))
    assert torch.equal(sampled(model, control(model, gain=0.0)), plain(model))


def test_positive_and_negative_share_one_object(model, written):
    positive, negative, *_ = apply(written)
    assert positive[0][1]["control"] is negative[0][1]["control"]
    assert positive[0][1]["control_apply_to_uncond"] is False
    assert positive[0][1]["control"].control_model is written.control_model


def test_percents_and_strength_are_the_hosts(model, written):
    whole = sampled(model, written)
    for changes in ({"end_percent": 0.3}, {"start_percent": 0.5}, {"strength": 0.5}):
        found = sampled(model, written, **changes)
        harness.assert_acts(found, whole)
        harness.assert_acts(found, plain(model))


def test_it_chains_with_ordinary_controlnets_on_either_side(model, written):
    stock, picture = tiny_models.controlnet(), tiny_models.picture()
    stock_node = host_nodes.ControlNetApplyAdvanced()
    both = stock_node.apply_controlnet(*harness.edits(), stock, picture, 1.0, 0.0, 1.0)
    behind = sampled(model, written, prompts=both)
    harness.assert_acts(behind, sampled(model, written))
    positive, negative, latent, _ = apply(written)
    both = stock_node.apply_controlnet(positive, negative, stock, picture, 1.0, 0.0, 1.0)
    before = harness.sample(model, latent["samples"], *both, noise=harness.noise())
    harness.assert_close(before, behind)


def test_a_latent_of_another_size_gets_its_own_hint(model, written):
    positive, negative, *_ = apply(written)
    added = harness.noise(12, 16)
    found = harness.sample(model, torch.zeros_like(added), positive, negative, noise=added)
    harness.assert_acts(found, plain(model, (12, 16)))


def test_several_pictures_at_once_are_each_as_alone(model, written):
    positive, negative, latent, _ = apply(written, batch_size=3)
    assert latent["samples"].shape == (3, 4, 8, 8)
    added = harness.noise(pictures=3)
    together = harness.sample(model, latent["samples"], positive, negative, noise=added)
    alone = harness.sample(model, latent["samples"][:1], positive, negative, noise=added[1:2])
    harness.assert_close(together[1:2], alone)


def test_the_objects_are_clean_after_a_run(model, written):
    positive, negative, latent, _ = apply(written)
    harness.sample(model, latent["samples"], positive, negative, noise=harness.noise())
    found = positive[0][1]["control"]
    assert found.scaled is None and found.cond_hint is None and found.model_sampling_current is None
    assert written.hint is None
    assert found.get_models() == [written.control_model_wrapped]


def test_it_runs_with_weights_that_are_left_behind(model):
    """Low memory: the host moves each weight when it is needed."""
    made = control(model)
    drawn = torch.Generator().manual_seed(4)
    asked = {
        "x": torch.randn(1, 4, 8, 8, generator=drawn),
        "hint": torch.rand(1, 324, 8, 8, generator=drawn).round(),
        "timesteps": torch.tensor([400.0]),
        "context": torch.randn(1, 7, 24, generator=drawn),
    }
    whole = made.control_model(**asked)
    made.control_model_wrapped.load(harness.CPU, lowvram_model_memory=1)
    layers = [layer for layer in made.control_model.modules() if hasattr(layer, "comfy_cast_weights")]
    assert made.control_model.model_lowvram and all(layer.comfy_cast_weights for layer in layers)
    hint = [layer for layer in made.control_model.input_hint_block.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(hint) == 17 and all(layer in layers for layer in hint)
    left = made.control_model(**asked)
    for one, two in zip(whole["output"] + whole["middle"], left["output"] + left["middle"], strict=True):
        assert torch.equal(one, two) and one.abs().max() > 0


def test_half_precision_runs(model):
    network = control(model)
    network.manual_cast_dtype = torch.float32
    assert torch.isfinite(sampled(model, network)).all()


# ---- what it is told of a picture


def test_a_new_picture_is_grey_and_an_edited_one_blanked():
    vae, seen = tiny_models.AveragingVAE(), []
    real = vae.encode
    vae.encode = lambda pixels: seen.append(pixels.clone()) or real(pixels)
    picture, text = tiny_models.picture(2), lines()
    hint_of(vae, text, None)
    hint_of(vae, text, picture)
    assert torch.equal(seen[0], torch.full((1, 64, 64, 3), GREY))
    assert (seen[1][:, 8:32, 8:56] == GREY).all()
    assert torch.equal(seen[1][:, 32:], picture[:, 32:])


def test_the_masked_latent_is_in_the_models_scale(model, written):
    kept, real = [], type(written.control_model.input_hint_block).forward
    block = written.control_model.input_hint_block
    block.forward = lambda hint, *rest: kept.append(hint[:, -4:].clone()) or real(block, hint, *rest)
    try:
        sampled(model, written, picture=tiny_models.picture())
    finally:
        del block.forward
    raw = hint_of(tiny_models.AveragingVAE(), lines(), tiny_models.picture()).masked
    harness.assert_close(kept[0][:1], raw * 0.18215)


def test_an_edit_draws_all_anew_or_the_lines_places_alone(model, written):
    picture = tiny_models.picture()
    whole = apply(written, picture=picture)[2]
    assert "noise_mask" not in whole and not whole["samples"].any()
    *_, latent, mask = apply(written, picture=picture, keep_rest=True)
    assert torch.equal(latent["samples"], tiny_models.AveragingVAE().encode(picture))
    assert torch.equal(mask, lines().positions) and torch.equal(latent["noise_mask"], mask)
    found = sampled(model, written, picture=picture, keep_rest=True)
    outside = (slice(None), slice(None), slice(4, None))
    harness.assert_close(found[outside], latent["samples"][outside], 1e-3)
    assert (found - latent["samples"])[:, :, 1:4, 1:7].abs().mean() > 0.05


def test_what_the_vae_cuts_off_is_cut_off_the_maps(model, written):
    text = lines(69, 78)
    *_, latent, mask = apply(written, text)
    assert latent["samples"].shape == (1, 4, 8, 9) and mask.shape == (1, 69, 78)
    hint = hint_of(tiny_models.AveragingVAE(), text, None)
    assert torch.equal(hint.positions[0], text.positions[:, 2:66, 3:75])
    assert torch.equal(hint.glyphs[0], text.glyphs[:, 4:132, 6:150])
    assert torch.isfinite(sampled(model, written, text)).all()


# ---- what it refuses


def test_other_nodes_and_other_controls_are_told_apart(model, written):
    with pytest.raises(ValueError, match="Apply Text Control instead of Apply ControlNet"):
        host_nodes.ControlNetApplyAdvanced().apply_controlnet(
            *harness.edits(), written, tiny_models.picture(), 1.0, 0.0, 1.0
        )
    with pytest.raises(ValueError, match="no text control"):
        apply(tiny_models.controlnet())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"picture": tiny_models.picture(height=72)}, "64 x 72 pixels, text_lines was made for 64 x 64"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "leave no step"),
    ],
)
def test_bad_input_is_a_sentence(written, given, message):
    with pytest.raises(ValueError, match=message):
        apply(written, **given)


def test_a_vae_of_another_family_is_a_sentence():
    class Sixteen:
        def encode(self, pixels):
            return torch.zeros(1, 16, 8, 8)

    with pytest.raises(ValueError, match=r"SD 1\.x latents of 4"):
        hint_of(Sixteen(), lines(), None)


@pytest.mark.parametrize("family", ["sdxl", "sd15-inpaint", "sd15-instruct"])
def test_controls_are_made_for_plain_sd_1_models(family):
    with pytest.raises(ValueError, match=r"SD 1\.x"):
        Layout.of(tiny_models.unet(family))


def test_a_control_without_lines_says_so(model, written):
    positive, negative = harness.edits()
    bare = [[tokens, extra | {"control": written.copy()}] for tokens, extra in positive]
    with pytest.raises(ValueError, match="not told what to write"):
        harness.sample_noise(model, None, bare, negative)
    assert isinstance(written.with_hint(Hint(*[torch.zeros(1)] * 3)).hint, Hint)
