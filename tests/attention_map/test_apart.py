"""Attention Map and Find Words where the picture looks at text in an attention of its own: Wan, frame by frame."""

import math

import pytest
import tiny_models
import torch
from palimpsest.nodes import host
from palimpsest.nodes.attention_map.nodes import AttentionMap, FindWords, ReadAttentionMap
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.words import ChosenWords
from tiny_transformers import latent, prompt, sample

TEXT, POSITIONS = 9, ((3, 4), (6,))

pytestmark = pytest.mark.usefixtures("inference")


def words_of(positive):
    return ChosenWords(("cat", "red"), POSITIONS, positive[0][0])


def left():
    half = torch.zeros(1, 96, 64)
    half[..., :32] = 1
    return half


def watched(model, positive):
    """(the model that records, the record, the attentions to text of the positive prompt)."""
    patched, found = tiny_models.execute(AttentionMap, model=model, tokens=words_of(positive))
    seen = []
    host.replace_joint(patched, host.family_of(model), "look", lambda earlier: seen.append)
    return patched, found, seen


@pytest.mark.parametrize(("family", "frames"), [("wan", 3), ("wan22", 1), ("anima", 1)])
def test_the_record_is_the_mean_of_what_all_layers_attend_to_frame_by_frame(models, family, frames):
    model, positive, negative = models(family), prompt(family, 1, TEXT), prompt(family, 2, TEXT)
    empty = latent(family, frames=frames)
    patched, found, seen = watched(model, positive)
    samples = sample(patched, positive, negative, empty)
    assert torch.equal(samples, sample(model, positive, negative, empty))
    ((grid, level),) = found.of(samples).levels.items()
    assert grid == (6, 4)
    torch.testing.assert_close(level, written_out(seen, 2, (frames, *grid)), rtol=0, atol=1e-6)


def written_out(seen, steps, places):
    """The words' shares in the positive prompt's attentions to text, (steps, frames, words, h, w), places (F, h, w)."""
    shares = []
    for each in (each for each in seen if each.sees_text):
        row = each.options["cond_or_uncond"].index(0)
        query, key = each.query[row].double(), each.key[row].double()
        matrix = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1).mean(0)
        shares.append(torch.stack([matrix[:, list(word)].sum(-1) for word in POSITIONS], -1))
    wanted = torch.stack(shares).unflatten(0, (steps, -1)).mean(1)  # steps, tokens, words
    return wanted.unflatten(1, places).movedim(-1, 2).float()


def test_a_video_is_read_as_masks_of_its_frames_and_leakage(models):
    """Three frames of the latent are nine of the video."""
    model, positive, negative = models("wan"), prompt("wan", 1, TEXT), prompt("wan", 2, TEXT)
    given = {"mask": left(), "mode": "after softmax, renormalised", "mask_negative": False}
    masked = tiny_models.execute(CrossAttentionMask, model=model, tokens=words_of(positive), **given)[0]
    leakages = []
    for each in (masked, model):
        patched, found, _ = watched(each, positive)
        samples = sample(patched, positive, negative, latent("wan", frames=3))
        inputs = {"samples": {"samples": samples}, "image": torch.zeros(9, 96, 64, 3), "mask": left()}
        pictures, mask, soft, leakage, _ = tiny_models.execute(ReadAttentionMap, record=found, **inputs)[:5]
        assert pictures.shape == (2 * 9, 96, 64, 3)
        assert mask.shape == soft.shape == (9, 96, 64)
        assert torch.equal(soft[1], soft[4]) and not torch.equal(soft[0], soft[1])
        leakages.append(leakage)
    assert 0 <= leakages[0] < 0.2 < leakages[1]


@pytest.mark.parametrize("family", ["wan", "anima", "qwen"])
def test_words_are_found_in_a_picture_of_a_model_for_clips(models, family):
    model, positive = models(family), prompt(family, 1, TEXT)
    latents = torch.randn(4, 1, 16, 12, 8, generator=torch.Generator().manual_seed(3))
    trajectory = host.Trajectory((1.0, 0.7, 0.3, 0.0), latents, 1.0, "", host.layout_fingerprint(model))
    inputs = {"model": model, "trajectory": trajectory, "tokens": words_of(positive), "positive": positive}
    (found,) = tiny_models.execute(FindWords, **inputs)[:1]
    ((grid, level),) = found.of(None).levels.items()
    assert grid == (6, 4)
    assert torch.isfinite(level).all() and level.min() > 0


def test_words_are_found_in_every_frame_of_an_inverted_clip(models):
    model, positive, seen = models("wan"), prompt("wan", 1, TEXT), []
    latents = torch.randn(4, 1, 16, 3, 12, 8, generator=torch.Generator().manual_seed(3))
    trajectory = host.Trajectory((1.0, 0.7, 0.3, 0.0), latents, 1.0, "", host.layout_fingerprint(model))
    looking = model.clone()
    host.replace_joint(looking, host.family_of(model), "look", lambda earlier: seen.append)
    inputs = {"model": looking, "trajectory": trajectory, "tokens": words_of(positive), "positive": positive}
    (found,) = tiny_models.execute(FindWords, **inputs)[:1]
    ((grid, level),) = found.of(None).levels.items()
    steps = len(level)
    torch.testing.assert_close(level, written_out(seen, steps, (3, *grid)), rtol=0, atol=1e-6)
    read = {"image": torch.zeros(9, 96, 64, 3), "mask": left()}
    mask = tiny_models.execute(ReadAttentionMap, record=found, **read)[1]
    assert mask.shape == (9, 96, 64)
