"""Ways of editing a real picture with a flow-matching model, for the benchmark of rivals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks.flow_scenes import FlowScenes
from benchmarks.scenes import defaults
from palimpsest.nodes.inversion import flow
from palimpsest.nodes.inversion.flow_nodes import FlowEdit, FlowSampler
from palimpsest.nodes.kv import nodes as kv_nodes

from .prepared_method import Prepared, size

SEED = 1  # of FlowEdit's noise
RANK = 16  # of what is learned


def prompt_swap(method: str, scenes: FlowScenes, guidance: float) -> Prepared:
    """Inversion by a method, then the new prompt from the same noise by the way down that belongs to it."""
    _, noise, found = scenes.inverted(scenes.latent, scenes.was, flow_method=method)
    chosen = defaults(FlowSampler) | {"method": method, "source_rows": 0}
    sampler = FlowSampler.execute(**chosen).args[0] if method == flow.FIREFLOW else None

    def draw(prompt: list) -> torch.Tensor:
        return scenes.sampled(scenes.model, prompt, scenes.nothing, guidance, noise, found, sampler=sampler)

    return Prepared(draw, lambda: draw(scenes.was), size(noise["samples"]), inverted=False)


def flow_edit(scenes: FlowScenes, guidance: float, **settings: Any) -> Prepared:
    """FlowEdit, without inversion."""
    chosen = defaults(FlowEdit) | settings

    def draw(prompt: list) -> torch.Tensor:
        sampler = FlowEdit.execute(scenes.was, scenes.nothing, **chosen).args[0]
        return scenes.sampled(scenes.model, prompt, scenes.nothing, guidance, scenes.latent, seed=SEED, sampler=sampler)

    return Prepared(draw, lambda: draw(scenes.was), 0, inverted=False)


def ours(
    scenes: FlowScenes, guidance: float, subject: bool = False, learned: bool = False, **editing: Any
) -> Prepared:  # fmt: skip
    """KV Inversion with recorded keys and values, or with learned ones, as the nodes stand except `editing`.

    subject: only the source's animal may be looked at.
    """
    chosen = defaults(kv_nodes.TuneKV) | {"guidance": guidance} | ({"rank": RANK} if learned else {"inner_steps": 0})
    kv, rebuilt, _ = kv_nodes.TuneKV.execute(
        scenes.model, scenes.trajectory, scenes.was, negative=scenes.nothing, **chosen
    ).args
    model = scenes.with_kv(kv, **editing, **{"source_mask": scenes.masks} if subject else {})
    draw = partial(scenes.sample, model, guidance=guidance)
    return Prepared(draw, lambda: rebuilt["samples"], size(scenes.noise["samples"]) + held(kv))


def held(kv: Any) -> int:
    """Bytes of what a record holds: the source's keys and values, and what was learned."""
    return kv.source.bytes + (kv.learned.bytes if kv.learned else 0)


METHODS: dict[str, tuple[str, Callable[[FlowScenes, float], Prepared]]] = {
    **{
        f"swap-{method.casefold()}": (f"prompt swap after {method}", partial(prompt_swap, method)) for method in flow.UP
    },
    "flow-edit": ("FlowEdit", flow_edit),
    "flow-edit-early": ("FlowEdit, start_percent 0.14", partial(flow_edit, start_percent=0.14)),
    "flow-edit-apart": (
        "FlowEdit, source guidance 1, start_percent 0.14",
        partial(flow_edit, source_guidance=1.0, start_percent=0.14),
    ),
    "kv": ("KV Inversion, recorded", ours),
    "kv-3": ("KV Inversion, recorded, source guidance 3", partial(ours, source_guidance=3.0)),
    "kv-soft": ("KV Inversion, recorded, source guidance 1", partial(ours, source_guidance=1.0)),
    "kv-subject": ("KV Inversion, recorded, source mask", partial(ours, subject=True)),
    "kv-frozen": ("KV Inversion, recorded, frozen", partial(ours, mode="frozen", source_guidance=1.0)),
    "kv-learned": ("KV Inversion, learned", partial(ours, learned=True)),
    "kv-learned-recompute": (
        "KV Inversion, learned, recompute",
        partial(ours, learned=True, mode="recompute", source_guidance=1.0),
    ),
}
