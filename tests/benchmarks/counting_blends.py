"""A step under Feature Blend, counted as counting.py counts. Import it where the host can be imported."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks import counting
from palimpsest.nodes.feature_blend.nodes import FeatureBlend

# Settings of the node and whether it has a mask, by the name of what is counted.
BLENDED = {
    "features cached": ({"source_features": "cached"}, True),
    "preset paper, cached": ({"source_features": "cached", "preset": "paper"}, False),
    "preset PFB-Diff object, cached": ({"source_features": "cached", "preset": "PFB-Diff object"}, True),
    "every feature, cached": ({"source_features": "cached", "layers": "input, middle, output, out"}, True),
    "features of the same step": ({"source_features": "same step"}, True),
}
GOALS = {"features of the same step": 1.55}
CACHED_GOAL = 1.02


def blended(model: Any, family: counting.Family, trajectory: Any, name: str) -> Any:
    """The model behind Feature Blend, with half of the picture masked where there is a mask."""
    settings, with_mask = BLENDED[name]
    mask = torch.ones(1, 64, 64).tril() if with_mask else None
    return FeatureBlend.execute(
        model, trajectory, family.prompt(), mask=mask, **counting.widgets(FeatureBlend, **settings)
    ).args[0]


def step(calls: counting.Calls, name: str) -> counting.Cost:
    """A step with guidance 7.5."""
    with torch.inference_mode(), counting.meta_host():
        patched = blended(calls.model, calls.family, calls.trajectory(1), name)
    return counting.sampling_step(patched, calls.family, 7.5)
