"""Feature Blend by the outputs of a transformer's blocks: what is exact, where it acts, and what is refused."""

import pytest
import tiny_models
import torch
from harness import assert_acts, assert_close
from palimpsest.nodes.feature_blend.nodes import FeatureBlend, TuneFeatureBlend
from tiny_transformers import EVERY, FAMILIES, latent, own_run, prompt, sample

STEPS = 3
SERVED = [*FAMILIES, "wan", "wan22"]
POOLED = ("flux", "sd3", "sd35m")
FEATURES_ALONE = {"blend_latents_until": 0.0}

pytestmark = pytest.mark.usefixtures("inference")


def blend(model, trajectory, family, **settings):
    """(the model that blends, the report)."""
    given = {"positive": prompt(family, 1)} | settings
    return tiny_models.execute(FeatureBlend, model=model, trajectory=trajectory, **given)


def drawn(model, family, text=3, pictures=1, tokens=9, **settings):
    given = {"steps": STEPS, "cfg": 1.0, "seed": 1} | settings
    return sample(model, prompt(family, text, tokens), prompt(family, 2), latent(family, pictures), **given)


def left(family):
    """A MASK in pixels, white on the left half."""
    height, width = (side * 8 for side in EVERY[family].side)
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("layers", ["output, out", "out", "input, output"])
def test_the_source_everywhere_is_the_source_where_tokens_are_all_of_the_prompt(models, family, layers):
    """The last block decides: behind it a token meets no other. A pooled vector acts there still, which is said."""
    model = models(family)
    trajectory, plain = own_run(model, family)
    black = torch.zeros_like(left(family))
    patched, report = blend(model, trajectory, family, layers=layers, mask=black, **FEATURES_ALONE)
    found, edit = drawn(patched, family), drawn(model, family)
    if family in POOLED:
        assert (found - plain).norm() < (edit - plain).norm()
        assert "pooled vector" in report
    else:
        assert torch.equal(found, plain)
        assert "pooled vector" not in report
    assert torch.equal(drawn(model, family, text=1), plain)


@pytest.mark.parametrize("family", SERVED)
def test_outside_of_a_mask_is_the_source_and_inside_is_not(models, family):
    model = models(family)
    trajectory, plain = own_run(model, family)
    patched, _ = blend(model, trajectory, family, mask=left(family), **FEATURES_ALONE)
    found, edit, half = drawn(patched, family), drawn(model, family), EVERY[family].side[1] // 2
    assert_acts(found[..., :half], plain[..., :half])
    if family in POOLED:
        assert (found - plain)[..., half:].norm() < (edit - plain)[..., half:].norm()
    else:
        assert torch.equal(found[..., half:], plain[..., half:])
    white = torch.ones_like(left(family))
    assert torch.equal(drawn(blend(model, trajectory, family, mask=white, **FEATURES_ALONE)[0], family), edit)
    idle = blend(model, trajectory, family, alpha_outside=1.0, mask=left(family), **FEATURES_ALONE)[0]
    assert torch.equal(drawn(idle, family), edit)


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen", "zimage", "wan"])
def test_recorded_and_beside_every_step_are_alike_guided_and_in_batches(models, family):
    model = models(family)
    trajectory, _ = own_run(model, family, pictures=2)
    found = []
    for where in ("cached", "same step"):
        patched, _ = blend(model, trajectory, family, mask=left(family), source_features=where, **FEATURES_ALONE)
        found.append(drawn(patched, family, cfg=3.0, pictures=2, tokens=12))
    assert_close(*found)
    assert_acts(found[0], drawn(model, family, cfg=3.0, pictures=2, tokens=12))


@pytest.mark.parametrize("family", ["qwen", "sd3", "zimage", "wan"])
def test_held_latents_leave_the_source_outside(models, family):
    """Held to the end the latent is the source's, whatever the prompt does; of clips of one frame as well."""
    model = models(family)
    trajectory, plain = own_run(model, family)
    patched, report = blend(model, trajectory, family, mask=left(family), blend_latents_until=1.0)
    half = EVERY[family].side[1] // 2
    assert_close(drawn(patched, family)[..., half:], plain[..., half:], 1e-5)
    assert "held for 100 %" in report


def test_another_nodes_block_replacement_acts_inside(models):
    for family, door in (("flux2", "dit"), ("zimage", "double_block")):
        model, calls = models(family), []
        trajectory, plain = own_run(model, family)
        other = model.clone()

        def replace(args, extra, calls=calls):
            calls.append(1)
            return extra["original_block"](args)

        def behind(args, calls=calls):
            calls.append(1)
            return {}

        if door == "dit":
            other.set_model_patch_replace(replace, "dit", "double_block", 0)
        else:
            other.set_model_patch(behind, "double_block")
        black = torch.zeros_like(left(family))
        assert torch.equal(drawn(blend(other, trajectory, family, mask=black, **FEATURES_ALONE)[0], family), plain)
        assert calls


def test_what_is_refused(models):
    model, family = models("flux"), "flux"
    trajectory, _ = own_run(model, family)
    with pytest.raises(ValueError, match=r"no 'double 7'; its features are double 0-1, single 0-1"):
        blend(model, trajectory, family, layers="double 7", mask=left(family))
    with pytest.raises(ValueError, match="no 'middle'"):
        blend(model, trajectory, family, layers="middle", mask=left(family))
    with pytest.raises(ValueError, match="a transformer has one"):
        blend(model, trajectory, family, preset="PFB-Diff object", mask=left(family))
    with pytest.raises(ValueError, match="invert the picture with this model"):
        blend(models("zimage"), trajectory, "zimage", mask=left("zimage"))
    given = {"positive": prompt(family, 1), "target_positive": prompt(family, 3), "negative": prompt(family, 2)}
    with pytest.raises(ValueError, match="U-Net"):
        tiny_models.execute(TuneFeatureBlend, model=model, trajectory=trajectory, **given)
    with pytest.raises(ValueError, match="see what the blocks of Anima give back"):
        blend(models("anima"), own_run(models("anima"), "anima")[0], "anima", mask=left("anima"))
    assert "blends single 0-1" in blend(model, trajectory, family, preset="paper")[1]
