"""The rival of `dev.py bench multimodal --ablation rival`: an attention of its own for a pooled picture."""

import pytest
import torch
from benchmarks import multimodal_pocket as learning
from palimpsest.kernels.connector import attend
from palimpsest.nodes.multimodal.vlm import load_vlm

pytestmark = pytest.mark.usefixtures("comfy_host_path")


@pytest.fixture(scope="module")
def rival(comfy_host_path):
    from multimodal import rival

    return rival


def test_the_picture_has_an_attention_of_its_own_beside_that_of_the_words(rival, model):
    unet = model.model.diffusion_model
    adapter = rival.Adapter(192, unet)
    key, part = next(iter(rival.host.transformer_parts(unet).items()))
    options = {"n_heads": part.attn2.heads, "block": key[:2], "block_index": key[2]}
    chance = torch.Generator().manual_seed(0)
    query = torch.randn(4, 6, part.attn2.to_q.out_features, generator=chance)
    text, image, nothing = (torch.randn(n, 4, 768, generator=chance) for n in (4, 1, 1))
    k, v = part.attn2.to_k(text), part.attn2.to_v(text)
    plain = attend(query, k, v, part.attn2.heads)

    def beside(tokens, strength=1.0, without=None, **more):
        return rival.Beside(adapter, tokens, strength, without)(query, k, v, options | more)

    assert torch.equal(beside(image, 0.0), plain)
    torch.testing.assert_close(beside(text), 2 * plain)  # keys and values begin as those of the words
    half = beside(image, 0.5, nothing, cond_or_uncond=[1, 0])
    for rows, tokens in ((slice(0, 2), nothing), (slice(2, 4), image)):
        torch.testing.assert_close(half[rows], plain[rows] + 0.5 * (beside(tokens) - plain)[rows])
    assert len(adapter.keys) == len(rival.host.transformer_parts(unet))
    assert adapter(torch.randn(2, 192)).shape == (2, 4, 768)


def test_only_the_adapter_learns_and_it_goes_on_where_it_stopped(rival, model, data, tmp_path):
    def trainer(steps):
        recipe = learning.Recipe(steps=steps, batch=2, heads=4, by_picture=0.0)
        made = rival.RivalTrainer(model, load_vlm(rival.SHIPPED / learning.VLM, "float32"), data, recipe, tmp_path)
        made.load_state()
        return made

    first, before = trainer(2), model.model.diffusion_model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    start = {name: p.detach().clone() for name, p in first.learned.items()}
    first.adapt(lambda text: None)
    assert all(name.startswith("adapter.") for name in first.learned)
    assert any(not torch.equal(p, start[name]) for name, p in first.learned.items())
    assert all(torch.equal(t, before[name]) for name, t in model.model.diffusion_model.state_dict().items())
    again = trainer(2)
    assert again.progress[rival.LESSON].step == 2
    assert all(torch.equal(again.learned[name], p) for name, p in first.learned.items())


def test_a_prompt_without_a_picture_is_pooled_to_nothing(rival, data):
    vlm = learning.OneVector.of(load_vlm(rival.SHIPPED / learning.VLM, "float32"))
    prompt = ("a ", learning.Picture(data.animal(0), 16), " dog  sitting")
    pooled = rival.pooled_of(vlm.hidden_states([prompt, ()]))
    assert pooled.shape == (2, vlm.width) and pooled[0].any() and not pooled[1].any()
    assert rival.words_of(prompt) == "a dog sitting"
    assert rival.words_of(()) == ""
