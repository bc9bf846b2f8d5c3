"""A step under Cross-Attention Mask, counted as counting.py counts. Import it where the host can be imported."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks import counting
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.host import sampling as host_sampling
from palimpsest.nodes.words import ChosenWords

TOKENS = 4  # of each region's words
# Settings of a region, how many of them there are, and whether they choose words, by the name of what is counted.
MASKED = {
    "1 region": ({"mode": "after softmax"}, 1, True),
    "8 regions": ({"mode": "after softmax"}, 8, True),
    "8 regions, renormalised": ({"mode": "after softmax, renormalised"}, 8, True),
    "8 regions, every token": ({"mode": "after softmax"}, 8, False),
}


def masked(model: Any, family: counting.Family, name: str) -> Any:
    """The model behind a chain of Cross-Attention Masks, all layers; cond and uncond, as they have the same prompt."""
    settings, regions, chosen = MASKED[name]
    text, grid = family.prompt()[0][0], torch.arange(64.0)
    for i in range(regions):
        places = tuple(range(1 + TOKENS * i, 1 + TOKENS * (i + 1)))
        tokens = ChosenWords(("word",), (places,), text) if chosen else None
        mask = (grid[None] * (i + 1) % 64 < 32).float().expand(1, 64, 64)
        widgets = counting.widgets(CrossAttentionMask, mask_negative=True, **settings)
        model = CrossAttentionMask.execute(model, mask, tokens=tokens, **widgets).args[0]
    return model


class CountSecondCall(counting.CountCall):
    """Counts a model call of which the run knows the like, as it does of all but the first."""

    def __call__(self, model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict, *rest: Any, **named: Any):
        model(x, x.new_ones(x.shape[0]), **extra_args)
        return super().__call__(model, x, sigmas, extra_args, *rest, **named)


def later_step(model: Any, family: counting.Family) -> counting.Cost:
    """A step with guidance 7.5 that is not the first one."""
    with torch.inference_mode(), counting.meta_host() as answers:
        count = CountSecondCall(model.model, answers)
        prompt, levels = family.prompt(), torch.tensor((1.0, 0.0))
        prompts = {"positive": prompt, "negative": prompt, "guidance": 7.5}
        host_sampling.sample(model, count, family.latent(), sigmas=levels, **prompts)
    return count.cost
