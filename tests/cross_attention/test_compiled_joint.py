"""A transformer behind the host's TorchCompileModel: the mask of each step, not that of the first."""

import pytest
import tiny_models
import tiny_transformers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.words import ChosenWords
from tiny_transformers import latent, prompt, sample

pytestmark = pytest.mark.usefixtures("inference")


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_compiled_model_draws_the_same(family):
    torch._dynamo.reset()
    model, positive, negative = tiny_transformers.model(family), prompt(family, 1), prompt(family, 2)
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda function, *args, **kwargs: attention_pytorch(*args, **kwargs)
    half = torch.zeros(1, 96, 64)
    half[..., :32] = 1
    inputs = {"tokens": ChosenWords(("word",), ((3, 4),), positive[0][0]), "mode": "after softmax, renormalised"}
    patched = tiny_models.execute(CrossAttentionMask, model=model, mask=half, end_percent=0.6, **inputs)[0]
    fast = tiny_models.execute(TorchCompileModel, model=patched, backend="eager")[0]
    wanted = sample(patched, positive, negative, latent(family), steps=4)
    assert torch.equal(sample(fast, positive, negative, latent(family), steps=4), wanted)
    assert (wanted - sample(model, positive, negative, latent(family), steps=4)).norm() > 1e-4 * wanted.norm()
    torch._dynamo.reset()
