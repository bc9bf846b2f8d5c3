"""From files to a picture by the host's own loaders: a small random FLUX layout, read by the pocket model's CLIP."""

import os
from pathlib import Path

import comfy.sd
import pytest
import tiny_models
import tiny_transformers
import torch
from comfy.ldm.flux.model import Flux
from palimpsest.nodes import host
from palimpsest.nodes.attention_map.nodes import AttentionMap
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask, RegionPhrase
from palimpsest.nodes.words.nodes import SelectWords
from safetensors.torch import save_file

import nodes

pytestmark = pytest.mark.usefixtures("inference")
LAYOUT = tiny_transformers.flux(context_in_dim=768, vec_in_dim=None, guidance_embed=False, mlp_ratio=4.0)
CPU = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """What UNETLoader makes of a file."""
    with torch.inference_mode():
        network = Flux(image_model="flux", **LAYOUT, **CPU)
        tiny_transformers.fill(network, 0)
        path = tmp_path_factory.mktemp("models") / "flux.safetensors"
        save_file({name: weight.clone().contiguous() for name, weight in network.state_dict().items()}, path)
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


@pytest.fixture(scope="module")
def clip():
    """The pocket model's text encoder, of CLIP-L's own size."""
    file = Path(os.environ["PALIMPSEST_MODELS"]) / "checkpoints" / "palimpsest_pocket.safetensors"
    if not file.is_file():
        pytest.skip("needs the pocket model: run `python dev.py setup`")
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(file), output_vae=False, output_model=False)[1]


def draw(model, positive, clip):
    negative = nodes.CLIPTextEncode().encode(clip, "")[0]
    return tiny_transformers.sample(model, positive, negative, tiny_transformers.latent("flux"))


def test_the_loaders_model_is_a_family_that_is_served(model):
    assert host.family_of(model).name == "FLUX.1"
    assert [str(layer) for layer in host.word_layers(model)] == ["double 0.0", "double 1.0", "single 0.0", "single 1.0"]


def test_words_phrases_and_maps_on_it(model, clip):
    half = torch.zeros(1, 96, 64)
    half[..., :32] = 1
    words, positive, _ = tiny_models.execute(SelectWords, clip=clip, text="a red cat in the snow", words="red")
    plain = draw(model, positive, clip)
    inputs = {"mask": half, "mode": "after softmax, renormalised", "hide_from_text": True}
    (masked,) = tiny_models.execute(CrossAttentionMask, model=model, tokens=words, **inputs)[:1]
    watched, record = tiny_models.execute(AttentionMap, model=masked, tokens=words)[:2]
    found = draw(watched, positive, clip)
    assert (found - plain).norm() > 1e-4 * plain.norm()
    ((grid, level),) = record.of(found).levels.items()
    assert grid == (6, 4) and level[..., 2:].abs().max() == 0 and level[..., :2].min() > 0
    patched, joined = tiny_models.execute(
        RegionPhrase, model=model, clip=clip, positive=positive, mask=half, phrase="a blue dog"
    )[:2]
    assert joined[0][0].shape == (1, 154, 768)
    assert (draw(patched, joined, clip) - plain).norm() > 1e-4 * plain.norm()
    assert torch.equal(draw(model, positive, clip), plain)
