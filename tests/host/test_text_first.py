"""Another node's tokens in front of the text: named by every technique that has to know where the picture begins."""

import pytest
import tiny_models
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_patch import UsoStyleProjectorPatch
from cross_attention.hidden_words import apply, both, half, words_of
from palimpsest.nodes.attention_map.nodes import AttentionMap
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from tiny_transformers import HEAD, latent, own_run, prompt, sample

STYLE = torch.randn(1, 4, HEAD, generator=torch.Generator().manual_seed(7))
NAMES = {"flux": "FLUX.1", "qwen": "Qwen-Image"}  # that have the door
NAMED = r"has 9 tokens in {}, and 13 stand in front of the picture: another node puts tokens in front of the text"

pytestmark = pytest.mark.usefixtures("inference")


def styled(model):
    """A clone with four tokens of a style in front of the text, as the host's USO Style Reference puts them there."""
    patched = model.clone()
    projector = ModelPatcher(torch.nn.Identity(), load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    patched.set_model_post_input_patch(UsoStyleProjectorPatch(projector, STYLE))
    return patched


def words_masked(model, trajectory, family):
    return apply(model, half(), words_of(prompt(family, 1)))


def words_recorded(model, trajectory, family):
    return tiny_models.execute(AttentionMap, model=model, tokens=words_of(prompt(family, 1)))[0]


def source_in_view(model, trajectory, family):
    given = {"positive": prompt(family, 1), "inner_steps": 0, "layers": "all"}
    kv = tiny_models.execute(TuneKV, model=model, trajectory=trajectory, **given)[0]
    return tiny_models.execute(ApplyKV, model=model, kv=kv, start_percent=0.0, source_guidance=1.0)[0]


def features_blended(model, trajectory, family):
    given = {"positive": prompt(family, 1), "mask": half(), "source_features": "same step"}
    return tiny_models.execute(FeatureBlend, model=model, trajectory=trajectory, **given)[0]


TECHNIQUES = [words_masked, words_recorded, source_in_view, features_blended]


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_tokens_in_front_are_refused(models, technique, family):
    trajectory, _ = own_run(models(family), family)
    with pytest.raises(ValueError, match=NAMED.format(NAMES[family])):
        sample(technique(styled(models(family)), trajectory, family), *both(family), latent(family), cfg=1.0)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_node_that_leaves_the_text_alone_is_served(models, technique):
    model, trajectory = models("flux"), own_run(models("flux"), "flux")[0]
    found, seen = [], []
    for looked in (model, model.clone()):
        if looked is not model:
            looked.set_model_post_input_patch(lambda args: seen.append(1) or args)
        found.append(sample(technique(looked, trajectory, "flux"), *both("flux", negative=12), latent("flux")))
    assert torch.equal(*found)
    assert seen
