"""Prompt-to-Prompt: its alignment of words by hand, its maps, its identities in the host."""

import harness
import pytest
import tiny_models
import torch
from palimpsest.nodes.inversion import ddim as inversion
from rivals import prompt_to_prompt, source_branch

STEPS, PICTURES, LENGTH = 3, 2, 6
END = prompt_to_prompt.END_OF_TEXT
NEGATIVE = tiny_models.prompt(2)

pytestmark = pytest.mark.usefixtures("inference")


def padded(*words):
    """Token ids of a prompt of LENGTH."""
    return [0, *words, *[END] * (LENGTH - 1 - len(words))]


def told(prompt, ids):
    """A CONDITIONING with the ids of both pictures."""
    return [[prompt[0][0], {"token_ids": [(ids + [END] * 100)[: prompt[0][0].shape[1]]] * PICTURES}]]


def test_a_swapped_word_takes_the_others_map():
    spread, taken = prompt_to_prompt.alignment(padded(5, 6), padded(5, 7))
    assert torch.equal(spread, torch.eye(LENGTH))
    assert torch.equal(taken, torch.ones(LENGTH))


def test_a_word_of_two_tokens_shares_the_map_of_one():
    spread, taken = prompt_to_prompt.alignment(padded(5, 6), padded(7, 8, 6))
    assert spread[1].tolist() == [0, 0.5, 0.5, 0, 0, 0]
    assert spread[2, 3] == spread[3, 4] == spread[4, 5] == 1
    assert torch.equal(taken, torch.ones(LENGTH))


def test_a_new_word_keeps_its_own_map():
    spread, taken = prompt_to_prompt.alignment(padded(5, 6), padded(5, 9, 6))
    assert taken.tolist() == [1, 1, 0, 1, 1, 1]
    source, edit = torch.rand(1, 2, 4, LENGTH), torch.rand(1, 2, 4, LENGTH)
    out = prompt_to_prompt.edited_maps(source, edit, spread[None], taken[None])
    torch.testing.assert_close(out, torch.cat([source[..., :2], edit[..., 2:3], source[..., 2:5]], -1))


def test_only_conditional_rows_are_changed():
    q, k, v = torch.randn(6, 9, 16), torch.randn(6, LENGTH, 16), torch.randn(6, LENGTH, 16)  # cond, uncond, source
    options = {"n_heads": 2, "attn_precision": None, "cond_or_uncond": [0, 1]}
    both = options | {source_branch.KEY: source_branch.Moment(2, 0.5)}
    spread, taken = torch.eye(LENGTH).expand(2, -1, -1), torch.ones(2, LENGTH)
    layer = prompt_to_prompt.CrossAttention(spread, taken, 0.8)
    plain, out = layer(q, k, v, options), layer(q, k, v, both)
    assert torch.equal(out[2:], plain[2:])
    wanted = layer(torch.cat([q[4:]] * 3), torch.cat([k[4:]] * 3), v, options)[:2]
    torch.testing.assert_close(out[:2], wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def inverted():
    """(model, trajectory) of two inverted pictures."""
    with torch.inference_mode():
        model, latent = tiny_models.unet(), tiny_models.latent(PICTURES)
        levels = inversion.descending_schedule(model, "normal", STEPS, None)
        return model, inversion.invert(model, latent["samples"], tiny_models.prompt(1), levels=levels)


def sample(model, trajectory, positive, cfg=3.0):
    """The host's own sampler from the inverted noise."""
    noise = model.model.process_latent_out(trajectory.latents[0].clone())
    return harness.sample(model, noise, positive, NEGATIVE, cfg=cfg, steps=STEPS)


def test_in_the_host_it_edits_is_idle_without_a_window_and_leaves_the_model(inverted):
    model, trajectory = inverted
    was, now = told(tiny_models.prompt(1), padded(5, 6)), told(tiny_models.prompt(3), padded(5, 7))
    plain = sample(model, trajectory, now)
    apply = prompt_to_prompt.apply
    assert torch.equal(sample(apply(model, trajectory, (was, now), True, 0.0, 0.0), trajectory, now), plain)
    edited = sample(apply(model, trajectory, (was, now), True), trajectory, now)
    assert not torch.allclose(edited, plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(sample(model, trajectory, now), plain)


def test_the_source_as_its_own_edit_stays_itself(inverted):
    model, trajectory = inverted
    was = told(tiny_models.prompt(1), padded(5, 6))
    patched = prompt_to_prompt.apply(model, trajectory, (was, was), False, 1.0, 1.0)
    plain = sample(model, trajectory, was, cfg=1.0)
    torch.testing.assert_close(sample(patched, trajectory, was, cfg=1.0), plain, rtol=1e-4, atol=1e-4)
