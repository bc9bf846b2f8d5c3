"""Attention Map and Find Words on transformers: the share of all attention that a picture's tokens give to words."""

import math

import pytest
import tiny_models
import torch
from palimpsest.nodes import host
from palimpsest.nodes.attention_map.nodes import AttentionMap, FindWords, ReadAttentionMap
from palimpsest.nodes.attention_map.recorder import chosen_layers
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from palimpsest.nodes.words import ChosenWords
from tiny_transformers import FAMILIES, latent, own_run, prompt, sample

TEXT = 9
PLACES = {"flux2": 512 - TEXT}
POSITIONS = ((3, 4), (6,))

pytestmark = pytest.mark.usefixtures("inference")


def words_of(positive):
    return ChosenWords(("cat", "red"), POSITIONS, positive[0][0])


def record(model, positive, **settings):
    return tiny_models.execute(AttentionMap, model=model, tokens=words_of(positive), **settings)


def mask(model, positive, mask):
    inputs = {"mask": mask, "mode": "after softmax, renormalised", "mask_negative": False}
    return tiny_models.execute(CrossAttentionMask, model=model, tokens=words_of(positive), **inputs)[0]


def left():
    half = torch.zeros(1, 96, 64)
    half[..., :32] = 1
    return half


def shares_of(attention, family):
    """(B, W, N) the same with the matrix written out, for the positive prompt's row."""
    row, image = attention.options["cond_or_uncond"].index(0), attention.sequence.image
    query, key = attention.query[row, :, image].double(), attention.key[row].double()
    matrix = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1).mean(0)
    first = PLACES.get(family, 0)
    return torch.stack([matrix[:, [first + i for i in word]].sum(-1) for word in POSITIONS])[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_is_the_mean_of_what_all_layers_attend_to_and_changes_nothing(models, family):
    model, positive, negative = models(family), prompt(family, 1, TEXT), prompt(family, 2, TEXT)
    plain, seen = sample(model, positive, negative, latent(family)), []
    patched, found = record(model, positive)
    host.replace_joint(patched, host.family_of(model), "look", lambda earlier: seen.append)
    samples = sample(patched, positive, negative, latent(family))
    assert torch.equal(samples, plain)
    ((grid, level),) = found.of(samples).levels.items()
    layers = [
        shares_of(each, family) for each in seen if each.layer is not None and 0 in each.options["cond_or_uncond"]
    ]
    wanted = torch.stack(layers).unflatten(0, (2, -1)).mean(1).unflatten(-1, grid)
    assert grid == next(each.sequence.grid for each in seen)
    assert level.shape == (2, 1, 2, *grid)
    torch.testing.assert_close(level, wanted.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen", "zimage", "sd3"])
@pytest.mark.parametrize("first", ["mask", "record"])
def test_masks_are_seen_on_either_side_of_the_recorder(models, family, first):
    model, positive, negative = models(family), prompt(family, 1, TEXT), prompt(family, 2, TEXT)
    if first == "mask":
        patched, found = record(mask(model, positive, left()), positive)
    else:
        patched, found = record(model, positive)
        patched = mask(patched, positive, left())
    samples = sample(patched, positive, negative, latent(family))
    (level,) = found.of(samples).levels.values()
    width = level.shape[-1] // 2
    assert level[..., :width].min() > 0
    assert level[..., width:].abs().max() == 0
    assert torch.equal(samples, sample(mask(model, positive, left()), positive, negative, latent(family)))


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_a_source_in_a_mask_is_not_counted_twice(models, family):
    """Where Apply KV's mask is black the picture is the model's, and so is the record."""
    model, positive, negative = models(family), prompt(family, 1, TEXT), prompt(family, 2, TEXT)
    given = {"positive": positive, "inner_steps": 0, "layers": "all"}
    kv = tiny_models.execute(TuneKV, model=model, trajectory=own_run(model, family, tokens=TEXT)[0], **given)[0]
    given = {"kv": kv, "start_percent": 0.0, "source_guidance": 1.0, "mask": torch.zeros(1, 96, 64)}
    levels = []
    for looked in (model, tiny_models.execute(ApplyKV, model=model, **given)[0]):
        patched, found = record(looked, positive)
        samples = sample(patched, positive, negative, latent(family))
        levels += found.of(samples).levels.values()
    assert torch.equal(*levels)


@pytest.mark.parametrize("family", ["flux", "qwen", "flux2"])
def test_a_record_is_read_as_masks_and_leakage(models, family):
    model, positive, negative = models(family), prompt(family, 1, TEXT), prompt(family, 2, TEXT)
    leakages = []
    for watched in (mask(model, positive, left()), model):
        patched, found = record(watched, positive)
        samples = sample(patched, positive, negative, latent(family))
        inputs = {"samples": {"samples": samples}, "image": torch.zeros(1, 96, 64, 3), "mask": left()}
        outputs = tiny_models.execute(ReadAttentionMap, record=found, **inputs)
        assert outputs[0].shape == (2, 96, 64, 3)
        leakages.append(next(value for value in outputs if isinstance(value, float)))
    assert 0 <= leakages[0] < 0.2 < leakages[1]  # a border is as wide as a token, and half of it lies outside


def test_layers_are_thirds_of_a_transformer(models):
    names = {
        part: [str(layer) for layer in chosen_layers(models("flux"), part)]
        for part in ("all", "encoder", "middle", "decoder")
    }
    assert names["encoder"] + names["middle"] + names["decoder"] == names["all"]
    assert names["decoder"] == ["single 0.0", "single 1.0"]


def test_words_are_found_in_a_picture_whose_way_to_noise_is_known(models):
    model, positive = models("zimage"), prompt("zimage", 1, TEXT)
    latents = torch.randn(4, 1, 16, 12, 8, generator=torch.Generator().manual_seed(3))
    trajectory = host.Trajectory((1.0, 0.7, 0.3, 0.0), latents, 1.0, "", host.layout_fingerprint(model))
    inputs = {"model": model, "trajectory": trajectory, "tokens": words_of(positive), "positive": positive}
    (found,) = tiny_models.execute(FindWords, **inputs)[:1]
    ((grid, level),) = found.of(None).levels.items()
    assert grid == (6, 4)
    assert torch.isfinite(level).all() and level.min() > 0
    other = host.Trajectory(trajectory.sigmas, latents, 1.0, "", host.layout_fingerprint(models("lumina2")))
    with pytest.raises(ValueError, match="another model architecture"):
        tiny_models.execute(FindWords, **inputs | {"trajectory": other})
