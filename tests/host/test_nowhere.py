"""What acts nowhere, or elsewhere than was meant, is said: when the node runs, or while its model samples."""

import logging

import harness
import pytest
import tiny_models
import torch
from palimpsest.nodes import host
from palimpsest.nodes.attention_fusion.apply import one_coloured
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.inversion.nodes import FlowEdit
from palimpsest.nodes.kv.nodes import ApplyKV

BLACK, WHITE = torch.zeros(1, 64, 64), torch.ones(1, 64, 64)


@pytest.fixture
def inverted(inference):
    """(model, trajectory, noise)."""
    model = tiny_models.unet()
    return model, *harness.invert(model, tiny_models.latent())[:2]


def defaults(node):
    return {
        entry.id: entry.default if entry.default is not None else entry.options[0]
        for entry in node.define_schema().inputs
        if getattr(entry, "default", None) is not None or getattr(entry, "options", None)
    }


@pytest.mark.parametrize(
    ("mask", "side", "says"),
    [
        (BLACK, "inside", "act nowhere; paint where they may act"),
        (WHITE, "outside", "act nowhere"),
        (WHITE, "inside", "act everywhere, nothing is masked"),
        (BLACK, "outside", "act everywhere"),
        (harness.half(), "inside", "act inside the mask, in 50% of the picture"),
    ],
)
def test_an_unpainted_mask_of_cross_attention_mask_is_said(inference, mask, side, says):
    done = CrossAttentionMask.execute(tiny_models.unet(), mask, **defaults(CrossAttentionMask) | {"side": side})
    assert says in done.ui["text"][0]


@pytest.mark.parametrize(
    ("mask", "settings", "says"),
    [
        (BLACK, {}, "the edit acts nowhere"),
        (WHITE, {}, "nothing of the source is kept"),
        (harness.half(), {"grow_mask": -16.0}, "the edit acts nowhere"),
        (harness.half(), {}, None),
        (BLACK, {"preset": "paper"}, None),
        (WHITE, {"alpha_inside": 0.7}, None),
    ],
)
def test_an_unpainted_mask_of_feature_blend_is_said(inverted, mask, settings, says):
    model, trajectory, _ = inverted
    positive = harness.prompts("sd15")[0]
    report = FeatureBlend.execute(model, trajectory, positive, mask, **defaults(FeatureBlend) | settings).args[1]
    assert (says in report) if says else ("all over" not in report)


@pytest.mark.parametrize(
    ("mask", "says"),
    [(BLACK, "the source acts nowhere: paint where it may act"), (harness.half(), None), (WHITE, None)],
)
def test_an_unpainted_mask_of_apply_kv_is_said(inverted, mask, says):
    model, trajectory, _ = inverted
    kv = harness.tune(model, trajectory, inner_steps=1)[0]
    text = ApplyKV.execute(model, kv, mask=mask, **defaults(ApplyKV)).ui["text"][0]
    assert (says in text) if says else ("all over" not in text)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (None, "the whole picture may change"),
        (WHITE, "the whole picture may change"),
        (harness.half(), "50% of the picture may change"),
        (BLACK, "the picture stays as it is: paint where it may change"),
    ],
)
def test_where_flowedit_acts_is_said(inference, mask, says):
    given = {"source": harness.prompts()[0], "source_negative": harness.prompts()[1], "mask": mask}
    assert says in FlowEdit.execute(**given, **defaults(FlowEdit)).ui["text"][0]


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (BLACK, "the source's shapes stay everywhere"),
        (WHITE, "self-attention is fused nowhere"),
        (harness.half(), None),
        (None, None),
    ],
)
def test_a_mask_of_attention_fusion_without_a_region_is_said(mask, says):
    said = "; ".join(one_coloured(mask))
    assert (says in said) if says else not said


def test_a_mask_of_other_proportions_is_said(inverted, caplog):
    model, trajectory, noise = inverted
    wide = harness.half(64, 128)
    masked = tiny_models.execute(CrossAttentionMask, model=model, mask=wide)[0]
    with caplog.at_level(logging.WARNING):
        harness.sample(masked, noise)
        assert caplog.text.count("128 x 64 pixels and the latent 8 x 8 cells") == 1  # though layers and steps are many
        harness.sample(tiny_models.execute(CrossAttentionMask, model=model, mask=harness.half())[0], noise)
    assert caplog.text.count("other proportions") == 1
    positive = harness.prompts("sd15")[0]
    report = FeatureBlend.execute(model, trajectory, positive, wide, **defaults(FeatureBlend)).args[1]
    assert "other proportions" in report


def test_a_crop_of_a_picture_under_a_mask_of_all_of_it_is_said(inverted, caplog):
    model, trajectory, noise = inverted
    kv = harness.tune(model, trajectory)[0]
    with caplog.at_level(logging.WARNING):
        harness.sample(tiny_models.execute(ApplyKV, model=model, kv=kv, mask=harness.half())[0], noise[..., :4])
    assert "the mask has 64 x 64 pixels and the latent 4 x 8 cells" in caplog.text


@pytest.mark.parametrize("size", [(512, 768), (515, 770), (64, 96), (1000, 1500)])
def test_sides_that_are_rounded_to_cells_are_like_proportions(size):
    assert host.stretched(torch.zeros(1, *size), (64, 96)) is None
    assert host.stretched(torch.zeros(1, *size), (64, 64)) is not None


def test_a_noise_mask_on_inverted_noise_is_said(inverted, caplog):
    model, trajectory, noise = inverted
    positive = harness.prompts("sd15")[0]
    blended = tiny_models.execute(
        FeatureBlend, model=model, trajectory=trajectory, positive=positive, mask=harness.half()
    )[0]
    over = torch.ones(1, 1, 8, 8)
    with caplog.at_level(logging.WARNING):
        harness.sample(blended, tiny_models.latent()["samples"], noise=harness.noise(), denoise_mask=over)
        assert "a noise mask lies on inverted noise" not in caplog.text
        harness.sample(blended, noise, denoise_mask=over)
    assert "a noise mask lies on inverted noise" in caplog.text
