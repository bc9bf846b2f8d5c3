"""What stands in the layers while KV Inversion tunes: the parameters being fitted, and a record of the source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.kv_inversion import content_preserving
from .. import host
from ..host import gradient
from .psi import BetweenKeyframes, OneOfSeveral, Psi


@dataclass
class TuningState:
    """What the attention replacements and the tuning loop share during one run. psi None: the network as it is.

    Of the last pass through the network as it is, for the prompt's rows R: inputs (R, N, C) of to_k and to_v, and
    sources, the keys and values (R, N, C). others: nodes that have patched the model, for errors.
    """

    psi: Psi | BetweenKeyframes | OneOfSeveral | None = None
    grids: dict[host.LayerKey, host.Grid] = field(default_factory=dict)
    inputs: dict[host.LayerKey, Tensor] = field(default_factory=dict)
    sources: dict[host.LayerKey, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mask: Tensor | None = None
    others: str = ""

    def note_grid(self, name: host.LayerKey, grid: host.Grid) -> None:
        """Keep a layer's grid. Raises ValueError where it was another before."""
        before = self.grids.setdefault(name, grid)
        if before != grid:
            raise ValueError(
                f"layer {name[0]} {name[1]}.{name[2]} has {before[1]} x {before[0]} tokens at one step and {grid[1]} x "
                f"{grid[0]} at another, because another node resizes it while sampling ({self.others or 'unknown'}); "
                "learned keys and values have one size: connect the model from before that node, or let it act in all "
                "steps (end_percent 1)."
            )

    def blended(
        self, layer: host.LayerKey, key: Tensor, value: Tensor, chunks: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        """K_bar, V_bar (chunks * rows, N, C) of a layer's K, V.

        One row of the parameters serves every prompt by broadcasting, several repeat.
        """
        embeddings, mask = self.psi.embeddings(layer), self.tokens(*self.grids[layer], rows)
        if mask is not None:
            embeddings = tuple(t * mask.to(t) for t in embeddings)
        k_hat, v_hat, weights = (t.to(key.dtype) for t in (*embeddings, self.psi.weights(layer)))
        if rows > 1 and chunks > 1:
            k_hat, v_hat, weights = (t.repeat(chunks, *(1,) * (t.ndim - 1)) for t in (k_hat, v_hat, weights))
        lambda_k, gamma_k, lambda_v, gamma_v = weights.unbind(1)
        return (
            content_preserving(key, k_hat, lambda_k, gamma_k),
            content_preserving(value, v_hat, lambda_v, gamma_v),
        )

    def tokens(self, height: int, width: int, rows: int) -> Tensor | None:
        """The mask's weight of every token, (rows, N, 1); None without a mask."""
        if self.mask is None:
            return None
        small = host.picture_rows(self.mask, self.mask.shape[0], height, width).flatten(1)[..., None]
        return small.repeat(rows // small.shape[0], 1, 1)


@dataclass(frozen=True)
class RecordInputs:
    """attn1 patch, behind those of other nodes: keep what the layers' to_k and to_v are fed for the source."""

    keys: frozenset[host.LayerKey]
    state: TuningState

    def __call__(self, query: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        name = host.layer_key(options)
        if self.state.psi is None and name in self.keys and is_source(options):
            if value is not None and value is not context and not torch.equal(value, context):
                raise ValueError(
                    "another node feeds self-attention different tokens for keys and for values (a hypernetwork?): "
                    "take it out for the tuning."
                )
            self.state.inputs[name] = prompts_rows(context, options)
        return query, context, value


@dataclass(frozen=True)
class TunedAttention:
    """attn1 replacement while tuning: K_bar, V_bar from the parameters being fitted (eq. 1), in every row."""

    keys: frozenset[host.LayerKey]
    state: TuningState
    previous: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        psi, name = self.state.psi, host.layer_key(options)
        if name in self.keys:
            self.state.note_grid(name, tuple(options["activations_shape"][-2:]))
            if psi is not None:
                key, value = self.blended(key, value, options)
            elif is_source(options):
                self.state.sources[name] = tuple(prompts_rows(t, options) for t in (key, value))
        return host.run_attention(options, self.previous, query, key, value)

    def blended(self, key: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        """K_bar, V_bar (R, N, C)."""
        return self.state.blended(host.layer_key(options), key, value, *host.chunk_rows(options, len(key)))


@dataclass(frozen=True)
class TunedJoint:
    """An act on a transformer's attention while tuning: K_bar, V_bar (eq. 1) for the picture's tokens, in every row.

    Of text, and of other pictures beside the one that is sampled, keys and values stay as they are. Keys are blended as
    the attention sees them, after rope: what is learned belongs to its place, as in mode recompute.
    """

    keys: frozenset[host.LayerKey]
    state: TuningState

    def __call__(self, attention: host.JointAttention) -> host.JointAttention | None:
        if attention.layer not in self.keys or not attention.sees_picture:
            return None
        sequence, call = attention.sequence, attention.call
        self.state.note_grid(attention.layer, sequence.grid)
        if self.state.psi is None:
            return None
        own = map(host.heads_joined, attention.own())
        tuned = self.state.blended(attention.layer, *own, call.chunks, call.pictures)
        return attention.with_picture(*(host.heads_apart(t, attention.key.shape[1]) for t in tuned))


def is_source(options: dict) -> bool:
    """Whether a pass has rows of the (positive) prompt, and is not one that another node's guidance adds."""
    return 0 in options["cond_or_uncond"] and not options.get(gradient.AGAIN)


def prompts_rows(tensor: Tensor, options: dict) -> Tensor:
    """The rows of the (positive) prompt, without a gradient.

    Of several that act at once those of the last chunk: the host runs prompts from the last to the first, in one call
    or in as many as memory asks for, so that it is the same one in the end.
    """
    chunks, _ = host.chunk_rows(options, len(tensor))
    last = max(place for place, kind in enumerate(options["cond_or_uncond"]) if kind == 0)
    return tensor.detach().chunk(chunks)[last]
