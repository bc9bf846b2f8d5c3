"""Cross-Attention Mask on tiny models, and the same with the attention's matrix written out."""

import math

import comfy.samplers
import tiny_models
import torch
from palimpsest.kernels.cross_attention_mask import masked as masked_attention
from palimpsest.nodes import host
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.cross_attention.regions import MODES
from palimpsest.nodes.words import ChosenWords

STEPS, GUIDANCE, TOKENS = 2, 3.0, 7
WORDS = (2, 3)
AFTER, RENORMALISED, PFB = MODES
POSITIVE, NEGATIVE = 0, 1


def words_of(prompt, *positions):
    """The TOKENS of one word with some positions in a prompt."""
    return ChosenWords(("word",), (positions or WORDS,), prompt[0][0])


def prompts(family="sd15", lengths=(TOKENS, TOKENS)):
    return tuple(tiny_models.prompt(seed, length, family) for seed, length in zip((1, 2), lengths, strict=True))


def half(height=64, width=64):
    """A MASK that is white on the left, with a soft border in between."""
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    mask[..., width // 2 : width // 2 + 8] = 0.3
    return mask


def apply(model, mask, tokens=None, **settings):
    inputs = {"mode": RENORMALISED if tokens is not None else AFTER, "mask_negative": False} | settings
    return tiny_models.execute(CrossAttentionMask, model=model, mask=mask, tokens=tokens, **inputs)[0]


def start(height=8, width=8, pictures=1, seed=3):
    return torch.randn(pictures, 4, height, width, generator=torch.Generator().manual_seed(seed))


def sample(model, positive, negative, latent=None, *, steps=STEPS, sampler="euler", cfg=GUIDANCE):
    sampling = comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler, "normal")
    noise = start() if latent is None else latent
    settings = {"cfg": cfg, "latent_image": torch.zeros_like(noise), "disable_pbar": True, "seed": 1}
    return sampling.sample(noise, positive, negative, **settings)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def differ(found, other):
    assert torch.isfinite(found).all()
    assert (found - other).norm() > 1e-4 * other.norm()


# ---- the same with the matrix written out, rows told apart by the test itself


def grid(mask, options):
    """A mask's mean over each place of a layer (pictures, N, 1)."""
    size = tuple(options["activations_shape"][-2:])
    return torch.nn.functional.adaptive_avg_pool2d(mask[:, None], size).flatten(2).mT


def by_matrix(model, weigh, layers=None):
    """A clone with materialised attention: weigh(which prompt, options, before, after) changes weights in place."""

    def attend(query, key, value, options):
        heads, chunks = options["n_heads"], options["cond_or_uncond"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        before = torch.ones(len(query), query.shape[1], key.shape[1])
        after = torch.ones_like(before)
        for which, *weights in zip(chunks, before.chunk(len(chunks)), after.chunk(len(chunks)), strict=True):
            weigh(which, options, *weights)
        weights = masked_attention(q @ k.mT / math.sqrt(q.shape[-1]), before[:, None], after[:, None])
        return (weights @ v).transpose(1, 2).flatten(2)

    patched = model.clone()
    for layer in layers or host.cross_attention_layers(model):
        patched.set_model_attn2_replace(attend, *layer.key)
    return patched


def weigh_words(mask, mode, positions=WORDS, which=(POSITIVE,)):
    """What `by_matrix` does for words at some positions in the rows of some prompts."""

    def weigh(chunk, options, before, after):
        if chunk in which:
            weight = grid(mask, options)
            weight = (weight >= 0.5).float() if mode == PFB else weight
            (after if mode == AFTER else before)[..., list(positions)] *= weight

    return weigh
