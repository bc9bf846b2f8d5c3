"""Tune Feature Blend towards edited pictures: what a step sees, where the alphas go, and what is refused."""

import pytest
import tiny_models
import torch
from feature_blend.blending import edits, half, invert, original, sample
from harness import assert_close
from instruct_pix2pix.editing import Editing, seen_by
from palimpsest.nodes.feature_blend.nodes import TuneFeatureBlend
from palimpsest.nodes.host import reference

PAIRS = 3


def both(prompts):
    """One CONDITIONING with an entry for each picture."""
    return [entry for prompt in prompts for entry in prompt]


@pytest.fixture(scope="module")
def pairs():
    """(model, trajectory, sources, inverted noise) of some pictures, each with a prompt of its own."""
    with torch.inference_mode():
        model, latent = tiny_models.unet(), tiny_models.latent(PAIRS)
        trajectory, noise = invert(model, latent, original())
        return model, trajectory, latent, noise


def tune(pairs, edited, **settings):
    """(weights, plot, report)."""
    model, trajectory, *_ = pairs
    positive, negative = edits()
    inputs = {"target_positive": positive, "negative": negative, "positive": original(), "steps": 12} | settings
    return tiny_models.execute(
        TuneFeatureBlend, model=model, trajectory=trajectory, edited={"samples": edited}, **inputs
    )


def test_alphas_fall_where_nothing_should_change_and_rise_towards_the_models_own_edit(pairs):
    model, _, latent, noise = pairs
    plain = sample(model, noise)
    kept, _, report = tune(pairs, latent["samples"])
    changed = tune(pairs, plain)[0]
    assert "towards 3 edited pictures" in report and "learned output 0" in report
    assert "1 of 3 pairs sampled to the end: set steps to 9 for all" in tune(pairs, plain, steps=4)[2]
    assert kept.info["towards"] == "the edited pictures"
    assert sum(kept.alphas.values()) < sum(changed.alphas.values())
    assert torch.equal(sample(model, noise), plain)


def test_more_steps_lower_the_loss(pairs):
    losses = tune(pairs, pairs[2]["samples"].flip(-1), steps=60, pairs_per_step=PAIRS)[0].info["losses"]
    assert len(losses) == 60 and sum(losses[-12:]) < sum(losses[:12])


def test_pairs_repeat_themselves_by_the_seed_wherever_the_features_come_from(pairs, monkeypatch):
    edited = pairs[2]["samples"].flip(-1)
    one, two, other = (tune(pairs, edited, seed=seed, steps=3)[0].alphas for seed in (1, 1, 7))
    assert one == two != other
    monkeypatch.setattr(reference, "free_memory", lambda: 0)
    by_step = tune(pairs, edited, seed=1, steps=3)[0]
    assert "same step" in by_step.info["source"]
    assert list(by_step.alphas.values()) == pytest.approx(list(one.values()), abs=1e-3)


@pytest.mark.parametrize("pairs_per_step", [1, 2])
def test_a_sampling_shows_some_pairs_their_own_prompts_pictures_and_noise(pairs_per_step):
    editing = Editing(pictures=PAIRS)
    source = editing.latent["samples"]
    edited = source.flip(-1)
    prompts = [
        [[text, {"concat_latent_image": source}] for text, _ in tiny_models.prompt(10 + i)] for i in range(PAIRS)
    ]
    inputs = {"trajectory": editing.trajectory, "positive": editing.picture, "negative": editing.picture}
    inputs |= {"target_positive": both(prompts), "edited": {"samples": edited}, "pairs_per_step": pairs_per_step}
    _, calls = seen_by(
        editing.model, lambda model: tiny_models.execute(TuneFeatureBlend, model=model, steps=9, **inputs)
    )
    steps = [call for call in calls if len(call[0]) == 2]
    levels, shown = editing.trajectory.steps, []
    assert len(steps) == 3 * levels
    for number, (_, chunks, pictures) in enumerate(steps):
        assert all(len(chunk) == pairs_per_step for chunk in (*chunks, *pictures))
        rows = [i for picture in pictures[0] for i in range(PAIRS) if torch.equal(picture, source[i])]
        if number % levels == 0:  # a sampling begins
            assert_close(chunks[0], editing.trajectory.latents[0, rows], 1e-6)
            shown.append(rows)
        assert rows == shown[-1]
    assert len(shown) == 3 and {row for rows in shown for row in rows} == set(range(PAIRS))


def test_the_papers_preset_sets_its_values(pairs):
    weights = tune(pairs, pairs[2]["samples"].flip(-1), preset="paper", steps=1, layers="middle")[0]
    assert next(iter(weights.alphas)) == "output 0" and weights.info["adversarial"] == 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask": half()}, "mask and edited are both connected"),
        ({"edited": tiny_models.latent(2)["samples"]}, "edited has 2 pictures of 8 x 8 latent cells"),
        ({"edited": tiny_models.latent(PAIRS, 8, 9)["samples"]}, "the trajectory 3 of 8 x 8"),
        ({"target_positive": both([edits()[0], edits()[0]])}, "target_positive has 2 prompts for 3 pictures"),
    ],
)
def test_pairs_that_cannot_be_are_refused(pairs, settings, said):
    with pytest.raises(ValueError, match=said):
        tune(pairs, **{"edited": pairs[2]["samples"].flip(-1)} | settings)


def test_the_papers_preset_needs_edited_pictures(pairs):
    model, trajectory, *_ = pairs
    with pytest.raises(ValueError, match="preset 'paper' learns from pictures as they should be"):
        tiny_models.execute(
            TuneFeatureBlend, model=model, trajectory=trajectory, positive=original(), target_positive=edits()[0],
            negative=edits()[1], preset="paper",
        )  # fmt: skip
