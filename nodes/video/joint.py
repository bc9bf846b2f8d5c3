"""Video Attention on image transformers: a row's picture keys and values are those of the frames it looks at.

Every query of the row sees them, text as well, and text stays the row's own. Several frames weigh as much as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import video_attention as maths
from .. import host
from .frames import FRAMES, LookAt, clip_frames, rows_seen

if TYPE_CHECKING:
    from .attention import VideoSettings

ACT = "frames"  # of the acts on joint attention
ONE_GRID = ("all", "decoder")  # choices of layers that do not go by the size of the grid, of which there is one here


@dataclass(frozen=True)
class JointFrames:
    """One node: which frames look at which, in what layers, when and how much; `length` as for FrameAttention."""

    look_at: LookAt
    layers: frozenset[host.LayerKey]
    window: host.Window
    strength: float = 1.0
    length: int = 0

    def acts_in(self, attention: host.JointAttention) -> bool:
        """Whether frames look at one another in a layer of this call; a single picture is left alone."""
        call = attention.call
        if call.pictures == 1 or attention.layer not in self.layers or not call.within(self.window):
            return False
        return clip_frames(call.pictures, call.frames, self.length) > 1

    def shown(self, attention: host.JointAttention) -> host.JointAttention:
        """The attention with the picture's keys and values of other frames."""
        call, image = attention.call, attention.sequence.image
        frames = clip_frames(call.pictures, call.frames, self.length)
        sources = rows_seen(self.look_at, frames, call.frames, self.length, attention.key.device)
        count = sources.shape[1]
        # one frame needs no mask, with which fewer kernels can be used
        bias = None if count == 1 else maths.share_kept(host.as_bias(attention.mask, attention.key), image, count)
        key, value = (maths.beside_text(t, image, sources) for t in (attention.key, attention.value))
        return attention.with_keys(key, value, bias)

    def mixed(self, attention: host.JointAttention) -> host.JointAttention | Tensor:
        """With what to go on; below full strength what comes out, mixed with what the own frame gives."""
        shown = self.shown(attention)
        if self.strength == 1.0:
            return shown
        return torch.lerp(attention.unrecorded().attended(), shown.attended(), self.strength)


@dataclass(frozen=True)
class FramesTogether:
    """An act on joint attention: the nodes of a model, of which one acts in a layer of a call."""

    nodes: tuple[JointFrames, ...]

    def __call__(self, attention: host.JointAttention) -> host.JointAttention | Tensor | None:
        acting = [node for node in self.nodes if node.acts_in(attention)]
        if len(acting) > 1:
            raise ValueError(
                f"{len(acting)} Video Attention nodes act in the same layers of a transformer at the same steps: give "
                "them other layers, spans that do not overlap, or take all but one out."
            )
        return acting[0].mixed(attention) if acting else None


def family_for_clips(model: Any, technique: str) -> host.Family | None:
    """The family of an image transformer with text and picture in one sequence, None for a U-Net.

    Raises ValueError for any other model, with what is missing.
    """
    family, kind = host.family_of(model), type(model.model).__name__
    if (family is not None and family.apart) or kind.startswith("WAN"):
        raise ValueError(
            f"{technique} lets the pictures of a batch look at one another, and in {family.name if family else kind} "
            "the frames of a video already do: sample the clip as one video of that model without this node, or load "
            f"an image model (SD 1.x, SD 2.x, SDXL, {', '.join(each.name for each in host.JOINT_FAMILIES)})."
        )
    return host.require_words(model, technique, host.JOINT_FAMILIES)


def apply_joint(model: Any, family: host.Family, settings: VideoSettings) -> Any:
    """A clone of a transformer whose frames look at one another; at strength 0 it is the model, bit for bit.

    Raises ValueError for settings that need a U-Net and for an empty span of steps.
    """
    require_settings(family, settings)
    window = host.Window.of(model, settings.start_percent, settings.end_percent)
    patched = model.clone()
    if settings.strength == 0.0:
        return patched
    node = JointFrames(
        look_at=FRAMES[settings.look_at],
        layers=frozenset(host.thirds(model, family)[settings.layers]),
        window=window,
        strength=settings.strength,
        length=settings.clip_length,
    )

    def together(earlier: FramesTogether | None) -> FramesTogether:
        return FramesTogether((*(earlier.nodes if earlier else ()), node))

    host.replace_joint(patched, family, ACT, together, host.SHARED)
    return patched


def require_settings(family: host.Family, settings: VideoSettings) -> None:
    """Raise ValueError for what transformers do not serve."""
    if settings.layers not in ONE_GRID:
        raise ValueError(
            f"layers is {settings.layers!r}, and all layers of {family.name} have the picture at one size: set layers "
            f"to {' or '.join(ONE_GRID)} (the last third of its blocks)."
        )
    if settings.temporal:
        raise ValueError(
            f"temporal is {settings.temporal:g}, an attention of places over time in the place of self-attention, and "
            f"{family.name} has text in the same attention: set temporal to 0."
        )
