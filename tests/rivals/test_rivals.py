"""The rivals of `dev.py bench rivals` in the host: their identities, limits and refusals."""

import comfy.model_patcher
import comfy.samplers
import harness
import pytest
import tiny_models
import torch
from comfy.patcher_extension import WrappersMP
from palimpsest.nodes.inversion import ddim as inversion
from rivals import masactrl, null_text, plug_and_play, source_branch

STEPS, GUIDANCE, PICTURES = 4, 3.0, 2
SOURCE, EDIT, NEGATIVE = (tiny_models.prompt(seed) for seed in (1, 3, 2))

needs_block_patches = pytest.mark.skipif(
    not hasattr(comfy.model_patcher.ModelPatcher, "set_model_middle_block_after_patch"),
    reason="this host does not let patches run residual blocks",
)
BRANCHED = [pytest.param(masactrl, id="masactrl"), pytest.param(plug_and_play, id="pnp", marks=needs_block_patches)]
NOTHING = {masactrl: {"end": 0.0}, plug_and_play: {"features_end": 0.0, "attention_end": 0.0}}
EVERYTHING = {
    masactrl: {"start": 0.0, "first_layer": 0.0},
    plug_and_play: {"features_end": 1.0, "attention_end": 1.0},
}

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def inverted():
    """(model, trajectory) of two inverted pictures."""
    with torch.inference_mode():
        model, latent = tiny_models.unet(), tiny_models.latent(PICTURES)
        levels = inversion.descending_schedule(model, "normal", STEPS, None)
        return model, inversion.invert(model, latent["samples"], SOURCE, levels=levels)


def sample(model, trajectory, positive, guidance=GUIDANCE, negative=NEGATIVE, steps=STEPS):
    """The host's own sampler from the inverted noise."""
    noise = model.model.process_latent_out(trajectory.latents[0].clone())
    return harness.sample(model, noise, positive, negative, cfg=guidance, steps=steps)


def branch_of(model, trajectory):
    """Every latent of the source's branch in one sampling run."""
    seen = {}

    def keep(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        seen.update(executor.class_obj.model_options["transformer_options"][source_branch.KEY + ".branch"].latents)
        return out

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "watch", keep)
    sample(watched, trajectory, EDIT)
    return torch.stack([seen[i] for i in range(STEPS + 1)])


@pytest.mark.parametrize("rival", BRANCHED)
def test_direct_inversion_keeps_the_source_on_its_trajectory(inverted, rival):
    model, trajectory = inverted
    whole = {"features_end": 1.0} if rival is plug_and_play else {}
    exact = branch_of(rival.apply(model, trajectory, SOURCE, True, **whole), trajectory)
    torch.testing.assert_close(exact, trajectory.latents, rtol=1e-5, atol=1e-5)


def test_a_free_source_is_plain_ddim_at_guidance_1(inverted):
    model, trajectory = inverted
    free = branch_of(masactrl.apply(model, trajectory, SOURCE, False), trajectory)
    plain = sample(model, trajectory, SOURCE, guidance=1.0)
    torch.testing.assert_close(model.model.process_latent_out(free[-1]), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(free[-1], trajectory.latents[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rival", BRANCHED)
@pytest.mark.parametrize("exact", [True, False])
def test_with_empty_windows_it_is_the_model_bit_for_bit(inverted, rival, exact):
    model, trajectory = inverted
    patched = rival.apply(model, trajectory, SOURCE, exact, **NOTHING[rival])
    assert torch.equal(sample(patched, trajectory, EDIT), sample(model, trajectory, EDIT))


@pytest.mark.parametrize("rival", BRANCHED)
def test_the_source_as_its_own_edit_stays_itself(inverted, rival):
    """With equal prompts at guidance 1 edit and source are the same row: what is copied is what was there."""
    model, trajectory = inverted
    patched = rival.apply(model, trajectory, SOURCE, False, **EVERYTHING[rival])
    plain = sample(model, trajectory, SOURCE, guidance=1.0)
    torch.testing.assert_close(sample(patched, trajectory, SOURCE, guidance=1.0), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rival", BRANCHED)
def test_an_edit_moves_and_pictures_do_not_mix(inverted, rival):
    model, trajectory = inverted
    patched = rival.apply(model, trajectory, SOURCE, True, **EVERYTHING[rival])
    edited, plain = sample(patched, trajectory, EDIT), sample(model, trajectory, EDIT)
    assert not torch.allclose(edited, plain, rtol=1e-3, atol=1e-3)
    other = trajectory.latents.clone()
    other[:, 0] += 0.5
    changed = type(trajectory)(**{**vars(trajectory), "latents": other})
    again = sample(rival.apply(model, changed, SOURCE, True, **EVERYTHING[rival]), trajectory, EDIT)
    assert not torch.allclose(again[0], edited[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again[1], edited[1], rtol=1e-4, atol=1e-4)


def test_masactrl_attends_to_the_sources_keys_and_values():
    q, k, v = torch.randn(3, 6, 10, 16)  # uncond, cond, source of two pictures
    told = {"n_heads": 2, "attn_precision": None, source_branch.KEY: source_branch.Moment(2, 0.5)}
    out = source_branch.SharedAttention(masactrl.mutual, 0.0, 1.0)(q, k, v, told)
    for row in range(6):
        heads = [t.unflatten(-1, (2, 8)).transpose(0, 1) for t in (q[row], k[4 + row % 2], v[4 + row % 2])]
        wanted = (heads[0] @ heads[1].mT / 8**0.5).softmax(-1) @ heads[2]
        torch.testing.assert_close(out[row], wanted.transpose(0, 1).flatten(1), rtol=1e-4, atol=1e-5)


def test_published_layers_are_those_of_sd15():
    """Layer 10 of 16 and block 4 of 12: shares that give the published numbers where they were published."""
    assert round(masactrl.FIRST_LAYER * 16) == 10
    assert round(plug_and_play.BLOCK * 12) == 4
    assert round(masactrl.START * 50) == 4


def test_another_schedule_is_refused(inverted):
    model, trajectory = inverted
    with pytest.raises(ValueError, match="no level of the trajectory"):
        sample(masactrl.apply(model, trajectory, SOURCE, True), trajectory, EDIT, steps=STEPS + 2)


def test_null_text_rebuilds_the_picture_better_than_ddim(inverted):
    model, trajectory = inverted
    phi, rebuilt = null_text.tune(model, trajectory, SOURCE, NEGATIVE, GUIDANCE, rate=0.05)
    wanted = model.model.process_latent_out(trajectory.latents[-1])
    plain = sample(model, trajectory, SOURCE)
    assert (rebuilt - wanted).norm() < 0.9 * (plain - wanted).norm()
    assert phi.shape == (STEPS, PICTURES, *NEGATIVE[0][0].shape[1:])
    again = sample(null_text.apply(model, trajectory, phi), trajectory, SOURCE)
    torch.testing.assert_close(again, rebuilt, rtol=1e-3, atol=1e-3)


def test_null_text_without_iterations_is_the_negative_prompt(inverted):
    model, trajectory = inverted
    phi, rebuilt = null_text.tune(model, trajectory, SOURCE, NEGATIVE, GUIDANCE, iterations=0)
    torch.testing.assert_close(phi[0], NEGATIVE[0][0].expand_as(phi[0]))
    torch.testing.assert_close(rebuilt, sample(model, trajectory, SOURCE), rtol=1e-4, atol=1e-4)


def test_negative_prompt_inversion_is_guidance_1(inverted):
    """The source's prompt on the negative side takes guidance out of the reconstruction."""
    model, trajectory = inverted
    found = sample(model, trajectory, SOURCE, negative=SOURCE)
    torch.testing.assert_close(found, sample(model, trajectory, SOURCE, guidance=1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rival", BRANCHED)
def test_the_model_is_left_as_it_was(inverted, rival):
    model, trajectory = inverted
    before = sample(model, trajectory, EDIT)
    sample(rival.apply(model, trajectory, SOURCE, True), trajectory, EDIT)
    assert torch.equal(sample(model, trajectory, EDIT), before)
    assert not model.model_options["transformer_options"].get("patches_replace")


def test_null_text_leaves_the_model_as_it_was(inverted):
    model, trajectory = inverted
    before = sample(model, trajectory, EDIT)
    null_text.tune(model, trajectory, SOURCE, NEGATIVE, GUIDANCE, iterations=1)
    assert torch.equal(sample(model, trajectory, EDIT), before)
    assert not any(getattr(module, "weight_function", []) for module in model.model.modules())
