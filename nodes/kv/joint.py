"""Apply KV on transformers: the picture's own recorded keys and values beside the edit's or in their place, or what was
learned blended into the edit's own.

Only tokens of the picture are shown, never the source's text. Without a mask every query may look at them, text as
well, as it looked at the source in the source's own pass; with one only the picture's queries inside of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.kv_inversion import content_preserving_folded
from .. import host, inputs
from ..host.streaming import PieceStream
from .embeddings import LEARNED, KVEmbeddings, LayerEmbeddings
from .modes import EXTEND, FROZEN, RECOMPUTE, served, shown_of
from .recorded import RecordedKV, Recording, attend_jointly, with_source
from .settings import ApplySettings

OWN = "own"  # beside a layer, of its pieces: lambda_k and lambda_v
HIDDEN = "palimpsest_kv.hidden"  # in the options of a model call: the source that is not looked at in it


@dataclass(frozen=True, eq=False)
class JointSource:
    """One Apply KV on a transformer: what is looked at, how, how much, when, in which layers, and where.

    mask: where in the edited picture it acts; source_mask: which part of it may be looked at. host.reference.Wanted.
    """

    kv: RecordedKV
    family: host.Family
    layers: frozenset[host.LayerKey]
    window: host.Window
    mode: str = EXTEND
    strength: float = 1.0
    mask: Tensor | None = None
    source_mask: Tensor | None = None
    remarks: host.Remarks = host.UNHEARD
    name: str = field(default_factory=lambda: host.source_name("kv"))

    @property
    def trajectory(self) -> host.Trajectory:
        """The source's."""
        return self.kv.trajectory

    def kinds(self, sigma: float) -> frozenset[host.LayerKey]:
        """The layers in which the source is looked at; none where nothing was learned that mode recompute shows."""
        if self.mode == RECOMPUTE and self.kv.learned.keyframes(self.kv.learned.at(sigma)) is None:
            return frozenset()
        return self.layers if self.window.always or sigma in self.window else frozenset()

    def follows(self, x: Tensor, sigma: float, run: host.Run) -> bool:
        """On any latent: keys and values are looked for, not added."""
        return True

    def patch(self, patched: Any) -> None:
        """Act in a clone's joint attention."""
        attend_jointly(patched, self.family, self.name)

    def recorder(self, sigma: float) -> Recording:
        """What keeps the source beside a step."""
        return Recording(self.kinds(sigma))

    def acting(self, sigma: float, pieces: host.Pieces, run: host.Run) -> Acting:
        """What shows the source to the edit at a level."""
        return Acting(self, pieces, run.kept((self.name, "masks"), dict))


@dataclass(frozen=True, eq=False)
class Acting:
    """What stands in the options of a call of the edit.

    pieces: K, V (B or 1, 2, H, N, D) by layer; in mode recompute what LearnedSteps gives.
    """

    source: JointSource
    pieces: host.Pieces
    kept: dict[Any, Tensor]

    def acts_in(self, attention: host.JointAttention) -> bool:
        """Whether the source is looked at in a layer of this call."""
        return attention.layer in self.source.layers and attention.options.get(HIDDEN) is not self.source

    def shown(self, attention: host.JointAttention) -> host.JointAttention:
        """The attention with the source in view of every query."""
        seen = self.visible(attention)
        if self.source.mode == RECOMPUTE:
            return self.replaced(attention, *self.recomputed(attention), seen)
        key, value = self.rows(attention, self.pieces[attention.layer])
        there = self.replaced if self.source.mode == FROZEN else self.extended
        return there(attention, key, value, seen)

    def recomputed(self, attention: host.JointAttention) -> tuple[Tensor, Tensor]:
        """K_bar, V_bar (R, H, N, D) from the edit's own (eq. 1)."""
        heads = attention.key.shape[1]
        hats = self.rows(attention, self.pieces[attention.layer])
        self.require_places(attention, hats[0].shape[1])
        weights = self.rows(attention, self.pieces[attention.layer, OWN])
        own = map(host.heads_joined, attention.own())
        return tuple(
            host.heads_apart(content_preserving_folded(projection, hat, weight), heads)
            for projection, hat, weight in zip(own, hats, weights, strict=True)
        )

    def rows(self, attention: host.JointAttention, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves (R, ...) of a piece (B or 1, 2, ...), of keys and of values, for every row of the call."""
        call = attention.call
        piece = call.frames.rows(piece).to(attention.key)
        piece = piece.expand(call.pictures, *piece.shape[1:]).repeat(call.chunks, *[1] * (piece.ndim - 1))
        return piece[:, 0], piece[:, 1]

    def visible(self, attention: host.JointAttention) -> Tensor | None:
        """Which of the source's tokens may be looked at, (R, N); None for all. At least the whitest one of each."""
        if self.source.source_mask is None:
            return None
        call, latents = attention.call, self.source.trajectory.latents
        name = ("visible", call.frames, call.pictures, call.chunks, attention.key.device)
        if name not in self.kept:
            patch = host.patch_of(call.model.diffusion_model)
            grid = tuple(-(-side // patch) for side in latents.shape[-2:])
            mask = host.as_encoded(self.source.source_mask, latents.shape[-2:])
            weights = host.rows_of_frames(mask, call.frames, call.pictures, *grid).flatten(1)
            seen = (weights >= 0.5) | (weights == weights.amax(1, keepdim=True))
            self.kept[name] = seen.repeat(call.chunks, 1).to(attention.key.device)
        return self.kept[name]

    def extended(
        self, attention: host.JointAttention, key: Tensor, value: Tensor, seen: Tensor | None
    ) -> host.JointAttention:
        """The source's K, V behind all others. strength weighs them: its logarithm is added to their scores."""
        if seen is not None and bool((seen == seen[:1]).all()):
            tokens = seen[0].nonzero()[:, 0]
            key, value, seen = key[:, :, tokens], value[:, :, tokens], None
        strength, bias = self.source.strength, None
        if strength != 1.0 or seen is not None:
            bias = key.new_full((1, key.shape[2]), math.log(strength))
            bias = bias if seen is None else bias.expand(len(key), -1).masked_fill(~seen, -math.inf)
        return attention.beside(key, value, bias)

    def replaced(
        self, attention: host.JointAttention, key: Tensor, value: Tensor, seen: Tensor | None
    ) -> host.JointAttention:
        """Other K, V in the place of the picture's own; strength is the share of the way from one to the other.

        Raises ValueError where a prompt's area, or another node, leaves other tokens.
        """
        self.require_places(attention, key.shape[2])
        new = []
        for own, other in zip(attention.own(), (key, value), strict=True):
            there = other if self.source.strength == 1.0 else torch.lerp(own, other, self.source.strength)
            new.append(there if seen is None else torch.where(seen[:, None, :, None], there, own))
        return attention.with_picture(*new)

    def require_places(self, attention: host.JointAttention, tokens: int) -> None:
        """Raise ValueError where the picture has not as many tokens as were recorded."""
        if tokens != attention.sequence.places:
            raise ValueError(
                f"mode {self.source.mode} puts {tokens} recorded tokens in the place of {attention.sequence.places}: "
                "sample the whole picture, without areas or tiles, or take mode extend."
            )

    def within_mask(self, out: Tensor, attention: host.JointAttention) -> Tensor:
        """out (R, T, H * D) with what the picture's queries find with the source in view, inside of the mask."""
        weight = self.weight(attention).to(out)
        image = attention.sequence.image
        edited = self.shown(attention).unrecorded().attended()[:, image]
        parts = out[:, : image.start], torch.lerp(out[:, image], edited, weight), out[:, image.stop :]
        return torch.cat(parts, 1)

    def weight(self, attention: host.JointAttention) -> Tensor:
        """The mask's weight of every token of the picture, (R, N, 1), cropped as each prompt's area is."""
        call, sequence, mask = attention.call, attention.sequence, self.source.mask
        name = ("mask", call.areas, call.frames, call.pictures, sequence, attention.query.device)
        if name not in self.kept:
            whole = next((area.whole for area in call.areas if area), call.latent)
            if unlike := host.stretched(mask, whole):
                self.source.remarks.say_once(call.run, unlike)
            mask = host.as_encoded(mask, whole)
            parts = [
                host.rows_of_frames(
                    mask if area is None else area.crop(mask), call.frames, call.pictures, *sequence.grid
                )
                for area in call.areas
            ]
            weights = torch.cat(parts).flatten(1).repeat(1, sequence.frames)
            self.kept[name] = weights[..., None].to(attention.query.device)
        return self.kept[name]


@dataclass(frozen=True, eq=False)
class LearnedSteps:
    """Where mode recompute has its pieces from: what was learned at the nearest level. host.reference.Source.

    By layer gamma K_hat, gamma V_hat (B, 2, N, C), and beside OWN lambda_k, lambda_v (B, 2, 1, 1).
    """

    learned: KVEmbeddings

    def begin(self, held: host.Held, guider: Any, noise: Tensor, **others: Any) -> None:
        """Nothing to prepare."""

    def at(self, wanted: JointSource, held: host.Held, step: host.Step) -> host.Pieces:
        """The pieces at a call's noise level; those of the next begin their way to the device."""
        index = self.learned.at(step.sigma)
        return held.use(index, partial(self.fetch, index, held.stream, step))

    def fetch(self, index: int, stream: PieceStream, step: host.Step) -> host.Pieces:
        """The pieces of a step on a device."""
        coming = min(index + 1, len(self.learned.learned) - 1)
        moved = stream.fetch(*(self.learned.pieces(i, (LEARNED,)) for i in (index, coming)), step.x.device)
        network = step.guider.inner_model
        found = self.learned.step(index, moved, step.x.device, network.get_dtype_inference())
        return dict(entry for key, layer in found.items() for entry in pieces_of(key, layer))


def pieces_of(key: host.LayerKey, layer: LayerEmbeddings) -> tuple[tuple[Any, Tensor], ...]:
    """What LearnedSteps gives of a layer."""
    shown = shown_of(layer)
    hats, own = torch.stack((shown.key, shown.value), 1), torch.stack((shown.own_key, shown.own_value), 1)
    return (key, hats), ((key, OWN), own)


def ready(model: Any, kv: Any, settings: ApplySettings, watched: Callable[[int], Any] = lambda passes: None) -> Any:
    """What Apply KV is given; a transformer's record of a file is recorded again, on the model that samples.

    watched: makes the sampling callback for so many passes. Raises ValueError for what apply_joint refuses, before
    anything runs.
    """
    recorded = not isinstance(kv, RecordedKV) or kv.source is not None
    if recorded or settings.strength == 0.0 or settings.mode == RECOMPUTE:
        return kv
    family = require_fitting(model, kv, settings)
    host.require_one_gpu(model)
    return with_source(model, kv, family, watched(len(kv.levels)))


def require_fitting(model: Any, kv: RecordedKV, settings: ApplySettings) -> host.Family:
    """The model's family. Raises ValueError for another model than the recorded one, and settings that do not fit."""
    inputs.require_same_layout(
        model, kv.layout, "these keys and values were recorded", f"load the {kv.family} model that was inverted"
    )
    family = host.require_words(model, "Apply KV")
    require_settings(kv, settings)
    absent = [layer for layer in kv.layers if layer not in host.thirds(model, family)["all"]]
    if absent:
        raise ValueError(
            f"these keys and values name layer {absent[0][0]} {absent[0][1]}, which {family.name} has not."
        )
    width = getattr(model.model.diffusion_model, family.width)
    for layer in () if kv.learned is None else kv.learned.layers:
        if layer.channels != width:
            raise ValueError(
                f"these keys and values were learned with {layer.channels} channels, {family.name} has {width} here: "
                "tune again."
            )
    return family


def apply_joint(
    model: Any,
    kv: RecordedKV,
    settings: ApplySettings,
    mask: Tensor | None = None,
    source_mask: Tensor | None = None,
    remarks: host.Remarks | None = None,
) -> tuple[Any, JointSource | None]:
    """(a clone of the model that attends to the recorded keys and values, its source). Strength 0: the model itself.

    Raises ValueError for another model than the recorded one and for settings that only a tuning serves.
    """
    family = require_fitting(model, kv, settings)
    patched = model.clone()
    if settings.strength == 0.0:
        return patched, None
    chosen = [key for key in host.thirds(model, family)[settings.layers] if key in kv.layers]
    window = host.Window.of(model, settings.start_percent, settings.end_percent)
    if not chosen:
        raise ValueError(f"layers is {settings.layers!r}, and nothing was recorded there: set layers to all.")
    if not window.always and not any(level in window for level in kv.levels):
        raise ValueError(
            "no recorded level lies between start_percent and end_percent: move them apart, or record more steps in "
            "Tune KV."
        )
    source = JointSource(
        kv=kv,
        family=family,
        layers=frozenset(chosen),
        window=window,
        mode=settings.mode,
        strength=settings.strength,
        mask=mask,
        source_mask=source_mask,
        remarks=remarks or host.UNHEARD,
    )
    if remarks is not None:
        apart = "each step takes what was recorded at the nearest noise level"
        recorded = host.Recorded.of(kv.trajectory, apart, from_start=mask is None)
        if settings.mode == RECOMPUTE:
            recorded = replace(recorded, how="tuned", guidance=kv.learned.guidance)
        host.compare_runs(patched, recorded, remarks)
    host.attach_source(patched, source, LearnedSteps(kv.learned) if settings.mode == RECOMPUTE else kv.source)
    return patched, source


def require_settings(kv: RecordedKV, settings: ApplySettings) -> None:
    """Raise ValueError for what recorded keys and values of a transformer do not serve."""
    if settings.mode not in served(kv):
        raise ValueError(
            f"mode {settings.mode!r} shows what was learned, and these keys and values of {kv.family} were recorded: "
            f"take mode {EXTEND} or {FROZEN}, or tune with inner_steps above 0."
        )
    if settings.look_ahead:
        raise ValueError(
            f"look_ahead is {settings.look_ahead:g}, which keys and values of {kv.family} do not have: set it to 0."
        )
