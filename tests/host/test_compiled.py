"""Models behind the host's TorchCompileModel: the picture of the model itself, compiled once."""

import harness
import pytest
import tiny_models
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from palimpsest.nodes.attention_map.nodes import AttentionMap
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.video.nodes import VideoAttention
from palimpsest.nodes.words import ChosenWords
from torch._dynamo.utils import counters

ONE_LEVEL = tiny_models.SD15 | {
    "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1],
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(autouse=True)
def _forgotten():
    """Nothing is compiled at the start of a test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def setup():
    """(model, trajectory, noise, kv) of two pictures, with the attention that GPUs have: it is compiled whole."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(tiny_models.FAMILIES, "one level", (*tiny_models.FAMILIES["sd15"][:2], ONE_LEVEL))
        model = tiny_models.unet("one level")
        options = model.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda function, *args, **kwargs: attention_pytorch(*args, **kwargs)
        trajectory, noise, *_ = harness.invert(model, tiny_models.latent(2))
        return model, trajectory, noise, harness.tune(model, trajectory, inner_steps=1)[0]


def compiled(model, backend="eager"):
    """eager: traced and guarded as ever, but no code is made."""
    return tiny_models.execute(TorchCompileModel, model=model, backend=backend)[0]


def mask_words(model, trajectory, kv, **settings):
    words = ChosenWords(("word",), ((2, 3),), harness.edits()[0][0][0])
    return tiny_models.execute(CrossAttentionMask, model=model, mask=harness.half(), tokens=words, **settings)[0]


def blend(model, trajectory, kv, **settings):
    inputs = {"trajectory": trajectory, "positive": harness.prompts()[0], "mask": harness.half()} | settings
    return tiny_models.execute(FeatureBlend, model=model, source_features="cached", **inputs)[0]


def together(model, trajectory, kv, **settings):
    patched = blend(mask_words(model, trajectory, kv, **settings), trajectory, kv, **settings)
    return harness.apply(patched, kv, mask=harness.half(), **settings)


def recorded(model):
    words = ChosenWords(("word",), ((2, 3),), harness.edits()[0][0][0])
    return tiny_models.execute(AttentionMap, model=model, tokens=words)[0]


EDITS = {
    "words": mask_words,
    "words, half of the time": lambda *given: mask_words(*given, end_percent=0.5),
    "features, half of the time": lambda *given: blend(*given, end_percent=0.5),
    "kv": lambda model, trajectory, kv: harness.apply(model, kv, mask=harness.half(), end_percent=0.5),
    "words, features and kv, half of the time": lambda *given: together(*given, end_percent=0.5),
    "words, recorded": lambda *given: recorded(mask_words(*given)),
    "video": lambda model, trajectory, kv: tiny_models.execute(VideoAttention, model=model, end_percent=0.5)[0],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_compiled_model_draws_the_same_and_more_steps_compile_nothing_more(setup, edit):
    model, trajectory, noise, kv = setup
    patched = edit(model, trajectory, kv)
    fast = compiled(patched)
    harness.sample(fast, noise, steps=2)
    graphs, frames = counters["stats"]["unique_graphs"], dict(counters["frames"])
    assert graphs
    wanted = harness.sample(patched, noise)
    assert torch.equal(harness.sample(fast, noise), wanted)
    assert (counters["stats"]["unique_graphs"], dict(counters["frames"])) == (graphs, frames)
    harness.assert_acts(wanted, harness.sample(model, noise))


def test_what_needs_a_gradient_runs_uncompiled(setup):
    model, trajectory, _, _ = setup
    found = [harness.tune(each, trajectory, inner_steps=2)[1] for each in (compiled(model), model)]
    assert torch.equal(*found)
    assert not counters["stats"]["unique_graphs"]


def test_code_can_be_made_of_what_is_left(setup):
    """By the backend of the node, which could not make code of a mask's way to a layer's grid."""
    model, trajectory, noise, kv = setup
    patched = blend(mask_words(model, trajectory, kv), trajectory, kv)
    found = harness.sample(compiled(patched, "inductor"), noise, steps=2)
    harness.assert_close(found, harness.sample(patched, noise, steps=2), 1e-3)
