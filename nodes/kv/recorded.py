"""Recorded keys and values of transformers: what Tune KV hands to Apply KV, alone or beside what was learned.

A transformer's layers have text and picture in one sequence, and normalise and rotate keys before they are used. So
what is kept are the picture's keys and values themselves, as the attention sees them (after rope, each at its own
place), of the source's own pass through the network. They are recorded once where they fit into memory, or made by a
pass of the source beside every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import host, inputs
from .embeddings import KVEmbeddings
from .settings import TuneSettings

TECHNIQUE = "KV Inversion"
ACT = "kv"  # of the acts on joint attention


@dataclass(frozen=True, eq=False)
class RecordedKV:
    """The source's image keys and values on a transformer, for some steps and layers.

    trajectory: the source's latents and levels; layers: those that were recorded; levels: the noise levels at which
    they were. source: where they come from at a sampling step; None of a file, for Apply KV to make. said: what that
    takes, in words. prompt: the source's CONDITIONING. noise (B, C, H, W), of a model for clips with one frame: the
    latent to begin in, as on a LATENT socket. learned: what was learned beside it, for mode recompute.
    """

    trajectory: host.Trajectory
    layers: tuple[host.LayerKey, ...]
    levels: tuple[float, ...]
    family: str
    source: host.Source | None
    said: str
    prompt: list
    noise: Tensor
    learned: KVEmbeddings | None = None

    @property
    def layout(self) -> str:
        """Fingerprint of the architecture."""
        return self.trajectory.layout

    @property
    def pictures(self) -> int:
        """Number of pictures B."""
        return self.trajectory.pictures


class Recording:
    """In a pass of the source: keep the keys and values of the picture's tokens."""

    def __init__(self, layers: frozenset[host.LayerKey]):
        self.layers = layers
        self.found: dict[host.LayerKey, Tensor] = {}

    def act(self, attention: host.JointAttention) -> None:
        """Keep K, V (B, 2, H, N, D). Raises ValueError where the source's prompt is more than one."""
        if attention.layer not in self.layers:
            return
        if attention.call.chunks != 1:
            raise ValueError(
                f"the source prompt has {attention.call.chunks} parts that act at once: connect one prompt that "
                "describes the whole picture."
            )
        self.found[attention.layer] = torch.stack(attention.own(), 1).detach()

    def pieces(self) -> host.Pieces:
        """What was kept, by layer. Raises ValueError if the source never ran."""
        if not self.found:
            raise ValueError("the source prompt does not act at every step: connect it without a time range.")
        return self.found


@dataclass(frozen=True)
class JointSteps:
    """An act on joint attention: the steps of Apply KV that stand among a call's options, in the order of the nodes."""

    names: tuple[str, ...] = ()

    def __call__(self, attention: host.JointAttention) -> host.JointAttention | Tensor | None:
        if attention.layer is None or not attention.sees_picture:
            return None
        steps = [step for step in map(attention.options.get, self.names) if step is not None]
        for step in (step for step in steps if isinstance(step, Recording)):
            step.act(attention)
        acting = [step for step in steps if not isinstance(step, Recording) and step.acts_in(attention)]
        if not acting:
            return None
        given = attention
        for step in (step for step in acting if step.source.mask is None):
            attention = step.shown(attention)
        masked = [step for step in acting if step.source.mask is not None]
        if not masked:
            return attention
        out = attention.attended()
        for step in masked:
            out = step.within_mask(out, given)
        return out


def attend_jointly(patched: Any, family: host.Family, name: str) -> None:
    """Let a node's steps, which stand under its name among the options, act on a clone's joint attention."""

    def steps(earlier: JointSteps | None) -> JointSteps:
        names = () if earlier is None else earlier.names
        return JointSteps(names if name in names else (*names, name))

    host.observe(patched)
    host.replace_joint(patched, family, ACT, steps, host.RECORDED)


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is recorded of a source, at the levels that are asked for; host.reference.Wanted."""

    trajectory: host.Trajectory
    family: host.Family
    layers: frozenset[host.LayerKey]
    levels: frozenset[float]
    name: str = field(default_factory=lambda: host.source_name("kv"))

    def kinds(self, sigma: float) -> frozenset[host.LayerKey]:
        """The layers that are wanted at a noise level."""
        return self.layers if sigma in self.levels else frozenset()

    def follows(self, x: Tensor, sigma: float, run: host.Run) -> bool:
        """On any latent."""
        return True

    def numbers(self, model: Any, sigma: float) -> int:
        """K and V of the picture's tokens in all of those layers."""
        network = model.model.diffusion_model
        height, width = (-(-side // host.patch_of(network)) for side in self.trajectory.latents.shape[-2:])
        return 2 * len(self.kinds(sigma)) * height * width * getattr(network, self.family.width)

    def patch(self, patched: Any) -> None:
        """Look on in the clone's attention."""
        attend_jointly(patched, self.family, self.name)

    def recorder(self, sigma: float) -> Recording:
        """What keeps the keys and values of a level."""
        return Recording(self.kinds(sigma))

    def acting(self, sigma: float, pieces: host.Pieces, run: host.Run) -> None:
        """Nothing: it only records."""


def record_joint(
    model: Any, trajectory: host.Trajectory, positive: list, settings: TuneSettings, callback: Any = None
) -> RecordedKV:
    """The source's keys and values on a transformer, at the steps and in the layers that are set.

    Of a tuning without keep_source only how they are recorded, for Apply KV to do where a mode needs them. Raises
    ValueError for what only a tuning could serve, and for another architecture than the trajectory's.
    """
    family = host.require_words(model, "Tune KV")
    require_recordable(family, settings)
    host.require_one_gpu(model)
    inputs.require_same_layout(
        model, trajectory.layout, "the trajectory was recorded", "invert the picture with this model"
    )
    trajectory.require_picture("Tune KV")
    layers = layers_of(model, family, settings)
    levels = tuple(trajectory.sigmas[step] for step in settings.recorded(trajectory.steps))
    start = host.before_fading(host.as_sampled(model, trajectory.latents[0].clone()), trajectory.sigmas[0])
    noise = model.model.process_latent_out(start).cpu()
    prompt = host.source_prompt(positive)
    kv = RecordedKV(trajectory, tuple(layers), levels, family.name, source=None, said="", prompt=prompt, noise=noise)
    return with_source(model, kv, family, callback) if settings.record_only or settings.keep_source else kv


def with_source(model: Any, kv: RecordedKV, family: host.Family, callback: Any = None) -> RecordedKV:
    """A record that knows where keys and values come from: made now where memory holds them, else beside every step."""
    wanted = Wanted(kv.trajectory, family, frozenset(kv.layers), frozenset(kv.levels))
    smaller = ", or record fewer layers or steps"
    source, said = host.chosen_source(
        model, wanted, kv.prompt, host.AUTO, pictures="", smaller=smaller, callback=callback
    )
    return replace(kv, source=source, said=said)


def layers_of(model: Any, family: host.Family, settings: TuneSettings) -> list[host.LayerKey]:
    """The layers that are set. Raises ValueError where this model has none there."""
    layers = host.thirds(model, family)[settings.layers]
    if not layers:
        raise ValueError(f"layers is {settings.layers!r}, and this model has no layers there: set layers to all.")
    return layers


def require_recordable(family: host.Family, settings: TuneSettings) -> None:
    """Raise ValueError for settings of a tuning that say nothing about a transformer's record."""
    require_plain(family, settings)
    if settings.record_only and settings.rank:
        raise ValueError(
            f"rank is for what is learned, and inner_steps is 0: keys and values of {family.name} are recorded as they "
            "are. Set rank to 0; layers, start_percent, end_percent and keyframes make the record smaller."
        )


def require_learnable(family: host.Family, settings: TuneSettings) -> None:
    """Raise ValueError for settings that only a U-Net's tuning has."""
    require_plain(family, settings)
    if settings.weights_only:
        raise ValueError(
            f"learn is {settings.learn!r}, which is for U-Nets: of {family.name} learn embeddings and weights, with a "
            "rank."
        )


def require_plain(family: host.Family, settings: TuneSettings) -> None:
    """Raise ValueError for auto_layers."""
    if settings.auto_layers:
        raise ValueError(
            f"auto_layers compares the blocks of U-Nets, the connected model is of {family.name}: set it off, and "
            "layers to a third of the blocks (decoder is the last)."
        )
