"""Attention fusion inside the host: while an edit is sampled, its attention is the source's where both prompts agree.

The source's queries and keys come from a pass of its own through the network, on its inverted latents and with its own
prompt (host.reference). With them and the edit's values the host's attention gives what FateZero computes from stored
maps (kernels/attention_fusion.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from .. import host
from .fusing import Fusing, FusionRun
from .prompts import Prompts
from .recording import CROSS, SELF, Recording

TECHNIQUE = "Attention Fusion"


@dataclass(frozen=True, eq=False)
class Fusion:
    """What is fused, where and when; host.reference.Wanted.

    layers: where, by kind. above: the kinds that act, each above this noise level. mask (1 or B, h, w): white where the
    edit's own structure acts. Without it and without blend words in `prompts` the source's self-attention acts
    everywhere. negative: self-attention in the negative prompt's rows as well.
    """

    trajectory: host.Trajectory
    prompts: Prompts
    layers: Mapping[str, frozenset[host.LayerKey]]
    above: Mapping[str, float]
    threshold: float = 0.3
    mask: Tensor | None = None
    negative: bool = False
    name: str = field(default_factory=lambda: host.source_name("attention_fusion"))

    def kinds(self, sigma: float) -> frozenset[str]:
        """The kinds of attention that are fused at a noise level."""
        return frozenset(kind for kind, level in self.above.items() if sigma > level)

    def follows(self, x: Tensor, sigma: float, run: host.Run) -> bool:
        """Maps say what looks where, and nothing of a latent's noise: they act on any."""
        return True

    def numbers(self, model: Any, sigma: float) -> int:
        """Numbers in the queries and keys of a picture; a mask from blend words is too small to count."""
        kinds, tokens = self.kinds(sigma), len(self.prompts.link)
        numbers, (height, width) = 0, self.trajectory.latents.shape[-2:]
        for place in host.places(model):
            size = math.ceil(height / place.scale) * math.ceil(width / place.scale)
            for kind, rows in ((SELF, 2 * size), (CROSS, size + tokens)):
                numbers += rows * place.layer.channels * (kind in kinds and place.layer.key in self.layers[kind])
        return numbers

    def patch(self, patched: Any) -> None:
        """Put the two replacements on a clone."""
        for name, kind, layers, make in (
            ("attn1", SELF, host.self_attention_layers, FusedSelfAttention),
            ("attn2", CROSS, host.cross_attention_layers, FusedCrossAttention),
        ):
            chosen = [layer for layer in layers(patched, TECHNIQUE) if layer.key in self.layers[kind]]
            host.replace_attention(patched, name, chosen, partial(make, self.name))

    def recorder(self, sigma: float) -> Recording:
        """For a pass of the source."""
        return Recording(self, sigma)

    def acting(self, sigma: float, pieces: host.Pieces, run: host.Run) -> Fusing:
        """For a pass of the edit."""
        return Fusing(self, pieces, self.kinds(sigma), run.kept((self.name, "fusion"), FusionRun))

    def refuse_without_edit(self, guider: Any, run: host.Run) -> None:
        """Raise ValueError at the start of a run that does not sample the edit's prompt."""
        if all(self.prompts.offset(cond.get("cross_attn")) is None for cond in run.every_cond):
            raise ValueError(
                "no sampled prompt is the edit's of Attention Fusion: connect its positive output to the sampler "
                "(ControlNet, areas, Combine and Concat between are fine, Average is not), and put nodes that look "
                "at the source themselves (Invert Picture, Tune KV) before this node."
            )


# ---- what the host calls ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusedSelfAttention:
    """attn1 replacement: records or fuses, as the step that its options hold."""

    name: str
    previous: Any = None

    @host.not_compiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        attend, step = partial(host.run_attention, options, self.previous), options.get(self.name)
        return attend(query, key, value) if step is None else step.self_attention(attend, query, key, value, options)


@dataclass(frozen=True)
class FusedCrossAttention:
    """attn2 replacement: records or fuses, as the step that its options hold."""

    name: str
    previous: Any = None

    @host.not_compiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        attend, step = partial(host.run_attention, options, self.previous), options.get(self.name)
        return attend(query, key, value) if step is None else step.cross_attention(attend, query, key, value, options)


def attach_fusion(patched: Any, fusion: Fusion, source: host.Source) -> None:
    """Let a clone fuse."""
    host.each_run(patched, fusion.name, fusion.refuse_without_edit)
    host.attach_source(patched, fusion, source)
