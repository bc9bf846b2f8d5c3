"""Cross-Attention Mask on tiny models, and the same with the attention's matrix written out."""

import math

import harness
import tiny_models
import torch
from palimpsest.kernels.cross_attention_mask import masked as masked_attention
from palimpsest.nodes import host
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.cross_attention.regions import MODES
from palimpsest.nodes.words import ChosenWords

STEPS, TOKENS = 2, 7
WORDS = (2, 3)
AFTER, RENORMALISED, PFB = MODES
POSITIVE, NEGATIVE = 0, 1
start, close = harness.noise, harness.assert_close


def words_of(prompt, *positions):
    """The TOKENS of one word with some positions in a prompt."""
    return ChosenWords(("word",), (positions or WORDS,), prompt[0][0])


def prompts(family="sd15", lengths=(TOKENS, TOKENS)):
    return tuple(tiny_models.prompt(seed, length, family) for seed, length in zip((1, 2), lengths, strict=True))


def half(height=64, width=64):
    """A MASK that is white on the left, with a soft border in between."""
    return harness.half(height, width, soft=0.3)


def apply(model, mask, tokens=None, **settings):
    inputs = {"mode": RENORMALISED if tokens is not None else AFTER, "mask_negative": False} | settings
    return tiny_models.execute(CrossAttentionMask, model=model, mask=mask, tokens=tokens, **inputs)[0]


def sample(model, positive, negative, added=None, **settings):
    """A new picture from noise."""
    return harness.sample_noise(model, added, positive, negative, **{"steps": STEPS} | settings)


def differ(found, other):
    harness.assert_acts(found, other, share=1e-4)


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
