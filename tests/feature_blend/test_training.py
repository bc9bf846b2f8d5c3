"""Tune Feature Blend: what is learned, its gradient, and that the model is left as it was."""

import comfy.model_management
import pytest
import tiny_models
import torch
from feature_blend.blending import EVERYTHING, STEPS, blend, edits, half, invert, original, sample, with_controlnet
from palimpsest.kernels import feature_blend as maths
from palimpsest.nodes.feature_blend.nodes import TuneFeatureBlend
from palimpsest.nodes.feature_blend.weights import BlendWeights
from palimpsest.nodes.host import reference


def tune(model, trajectory, **settings):
    """(weights, plot, report)."""
    positive, negative = edits("sdxl" if model.model.diffusion_model.num_classes else "sd15")
    inputs = {"target_positive": positive, "negative": negative, "positive": original(), "steps": 12} | settings
    return tiny_models.execute(TuneFeatureBlend, model=model, trajectory=trajectory, **inputs)


@pytest.mark.parametrize(("keep_edit", "towards"), [(0.0, -1), (20.0, 1)], ids=["rebuild", "keep"])
@pytest.mark.parametrize("mask", [None, half()], ids=["everywhere", "mask"])
def test_alphas_fall_to_the_source_or_rise_to_the_edit(inverted, plain, keep_edit, towards, mask):
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
    monkeypatch.setattr(reference, "free_memory", lambda: 0)
    by_step = tune(model, trajectory, steps=3)[0]
    assert "same step" in by_step.info["source"] and "cached" in by_cache.info["source"]
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
        ({"layers": "decoder"}, "names no layer"),
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
        (BlendWeights({"middle": 0.5}, "another"), "tuned with another model architecture"),
        (BlendWeights({"output 11": 0.5}, layout), "does not have .output 11."),
    ):
        with pytest.raises(ValueError, match=said):
            blend(model, trajectory, blend_weights=wrong)


def test_the_plot_shows_a_bar_for_every_feature(inverted):
    _, plot, _ = tune(*inverted[:2], steps=1, layers=EVERYTHING)
    assert plot.shape[0] == 1 and plot.shape[3] == 3 and 0 <= plot.min() < plot.max() <= 1
    shorter = tune(*inverted[:2], steps=3, layers="out")[1]
    assert shorter.shape[1] < plot.shape[1]
