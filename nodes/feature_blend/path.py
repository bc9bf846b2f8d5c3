"""Whether the latent that is sampled lies on the source's path, where alone the source's features mean anything.

The source's features give the noise of its own latent. In a latent with other noise, of a sampler that adds its own or
of a random start, that noise would stay. So outside of the mask the latent is held longer; elsewhere features end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...kernels import feature_blend as maths
from .. import host
from .latents import HeldLatents

INSIDE, OUTSIDE = "inside", "outside"
HELD_ON = (
    "the latent has left the source's path (a sampler that adds noise, or few steps): outside of the mask it stays "
    "held as long as features act"
)
OFF_THE_PATH = "the latent is not on the source's path (random noise, or a sampler that adds its own): "
ENDED = {
    INSIDE: OFF_THE_PATH + "the source's features act no more{where}",
    OUTSIDE: OFF_THE_PATH + "blend_latents_until 0 does not hold it, and the source's features act no more outside of "
    "the mask",
}


class Followed:
    """What a run keeps: since which level the latent is free, and where it has left the path."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.left: frozenset[str] = frozenset()
        self.masks: dict[tuple, Tensor] = {}


@dataclass(frozen=True, eq=False)
class Path:
    """The source's path, and where features act on it: inside, outside of a mask (1 or B, h, w).

    A clip has a mask for all or each of its frames. held: what the latent is held to outside of it, or None; held_on:
    the noise level above which it may be held longer.
    """

    trajectory: host.Trajectory
    where: frozenset[str]
    mask: Tensor | None
    held: HeldLatents | None
    held_on: float
    remarks: host.Remarks
    name: str = field(default_factory=lambda: host.source_name("feature_blend.path"))

    def left(self, x: Tensor, sigma: float, run: host.Run) -> frozenset[str]:
        """Where the latent x at a noise level, (B, C, H, W) or a clip's, has left the path; it stays so for the run."""
        followed = run.kept(self.name, Followed)
        where = self.where - followed.left
        if self.held is not None and self.held.at(sigma, run):
            where -= {OUTSIDE}
        for region in self.departed(sorted(where), x, sigma, followed):
            if region == OUTSIDE and self.held is not None:
                self.held.hold_on(run, self.held_on)
                self.remarks.say_once(run, HELD_ON)
            else:
                followed.left |= {region}
                self.remarks.say_once(
                    run, ENDED[region].format(where="" if self.mask is None else " inside of the mask")
                )
        return followed.left

    def departed(self, where: list[str], x: Tensor, sigma: float, followed: Followed) -> list[str]:
        """Those regions in which a picture of the batch is off the path."""
        if not where:
            return []
        if followed.since is None:
            followed.since = sigma if self.held is None else max(sigma, self.held.above)
        x = x.squeeze(2) if x.ndim == 5 else x  # a clip of one frame
        path = host.latents_at(self.trajectory, sigma).to(x)
        apart = [float(maths.departure(x, path, self.weight(region, x, followed)).max()) for region in where]
        farthest = maths.farthest_departure(sigma, followed.since)
        return [region for region, distance in zip(where, apart, strict=True) if distance > farthest]

    def weight(self, region: str, x: Tensor, followed: Followed) -> Tensor:
        """A region's share of each cell of the latent, (B or 1, 1, H, W) or (1, 1, F, H, W)."""
        if self.mask is None:
            return x.new_ones(1, 1, *x.shape[2:])
        key = (tuple(x.shape), x.device)
        if key not in followed.masks:
            followed.masks[key] = host.rows_on(self.mask, x).to(x)
        inside = followed.masks[key]
        return inside if region == INSIDE else 1 - inside

    def alphas(self, alphas: Any, left: frozenset[str]) -> Any:
        """The edit's shares of features, all of it where the latent has left the path."""
        if not left:
            return alphas
        return {
            key: (1.0 if INSIDE in left else inside, 1.0 if OUTSIDE in left else outside)
            for key, (inside, outside) in alphas.items()
        }
