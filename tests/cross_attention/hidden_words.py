"""What tests of Cross-Attention Mask on transformers share: a soft mask of the left half, and words that act in it."""

import tiny_models
import torch
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.cross_attention.regions import MODES
from palimpsest.nodes.words import ChosenWords
from tiny_transformers import prompt

AFTER, RENORMALISED, PFB = MODES
TEXT, WORDS = 9, (3, 4)  # tokens of a prompt, and those that a mask is for


def half(soft=0.3):
    """A MASK that is white on the left, with a soft border in between."""
    mask = torch.zeros(1, 96, 64)
    mask[..., :32], mask[..., 32:48] = 1, soft
    return mask


def words_of(positive, *positions):
    return ChosenWords(("word",), (positions or WORDS,), positive[0][0])


def apply(model, mask, tokens, **settings):
    inputs = {"mode": RENORMALISED, "mask_negative": False} | settings
    return tiny_models.execute(CrossAttentionMask, model=model, mask=mask, tokens=tokens, **inputs)[0]


def both(family, negative=TEXT, tokens=TEXT):
    """A positive and a negative prompt of so many tokens."""
    return prompt(family, 1, tokens), prompt(family, 2, negative)


def close(found, wanted, share=2e-6):
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() <= share * wanted.norm()


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())
