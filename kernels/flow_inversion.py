"""Flow-matching models: walking a picture up to noise and down again, and FlowEdit, which needs no walk up.

A flow's path is x_t = (1 - t) x_0 + t eps, t = 1 pure noise (arXiv:2209.03003, 2210.02747); a model gives the velocity
v = dx/dt = eps - x_0. A host that gives the denoised picture instead has v = (x - x_0) / t, the same quotient as eps in
`ddim`, so that Euler's step here is `ddim_step` there, letter for letter.

`Velocity` is v(x, t): tensors of x's shape, t a number. Every solver below keeps the velocity it asked last, and asks
once more than there are steps, at the start: `integrate` runs them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Velocity = Callable[[Tensor, float], Tensor]
    Step = Callable[[Velocity, Tensor, Tensor | None, float, float], tuple[Tensor, Tensor | None]]


# ---- the path -------------------------------------------------------------------------------------------------------


def noised(clean: Tensor, noise: Tensor, t: float) -> Tensor:
    """x_t = (1 - t) x_0 + t eps of the straight path.                                               arXiv:2209.03003"""
    return (1.0 - t) * clean + t * noise


def velocity_of(x: Tensor, denoised: Tensor, t: float) -> Tensor:
    """v = (x - x_0) / t, from x = (1 - t) x_0 + t eps and v = eps - x_0. Raises ValueError at t <= 0."""
    if not t > 0.0:
        raise ValueError(f"velocity_of: t must be above 0, got {t}")
    return (x - denoised) / t


def euler(x: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """x' = x + (t' - t) v."""
    return x + (t_next - t) * velocity


# ---- solvers: (v, x, last velocity, t, t') -> (x', velocity for the next step) --------------------------------------


def euler_step(
    velocity: Velocity, x: Tensor, last: Tensor | None, t: float, t_next: float
) -> tuple[Tensor, Tensor | None]:
    """Euler, v asked where x stands: one evaluation. What the host's `euler` does on the way down."""
    return euler(x, velocity(x, t), t, t_next), None


def uni_inv_step(velocity: Velocity, x: Tensor, last: Tensor | None, t: float, t_next: float) -> tuple[Tensor, Tensor]:
    """Uni-Inv, a step up: v asked at the level climbed to, in the point that the last velocity leads to.

        x~ = x + (t' - t) v_last,   v = v(x~, t'),   x' = x + (t' - t) v                                arXiv:2504.13109

    The Euler step down from x' asks at (x', t'), and x~ is near x': that is why plain Euler undoes it. The first step
    has no last velocity and asks for one at (x, t). T steps cost T + 1 evaluations.
    """
    last = velocity(x, t) if last is None else last
    found = velocity(euler(x, last, t, t_next), t_next)
    return euler(x, found, t, t_next), found


def fireflow_step(velocity: Velocity, x: Tensor, last: Tensor | None, t: float, t_next: float) -> tuple[Tensor, Tensor]:
    """FireFlow: the midpoint rule with the last midpoint's velocity in the place of v(x, t).

        m = (t + t') / 2,   v = v(x + (m - t) v_last, m),   x' = x + (t' - t) v                         arXiv:2412.07517

    Second order at one evaluation a step. Up and down alike: the way down has to be this one, too. T + 1 evaluations.
    """
    last = velocity(x, t) if last is None else last
    middle = (t + t_next) / 2
    found = velocity(euler(x, last, t, middle), middle)
    return euler(x, found, t, t_next), found


def integrate(step: Step, velocity: Velocity, x: Tensor, levels: Sequence[float]) -> list[Tensor]:
    """x at every level, the first included; levels ascend on the way up and descend on the way down."""
    states, last = [x], None
    for t, t_next in itertools.pairwise(levels):
        x, last = step(velocity, x, last, t, t_next)
        states.append(x)
    return states


def with_offset(stepped: Tensor, source_stepped: Tensor, source_next: Tensor) -> Tensor:
    """A step that goes where the source went: x' + (z' - step(z)), z the source's stored way.      arXiv:2605.02417

    In a row that stands on the source's way, step(x) = step(z), so that it arrives at z' whatever the solver's error:
    its reconstruction is exact.
    """
    return stepped + (source_next - source_stepped)


# ---- FlowEdit -------------------------------------------------------------------------------------------------------


def coupled(edited: Tensor, clean: Tensor, source: Tensor) -> Tensor:
    """Where the target's velocity is asked: z_tar = z_edit + z_src - x_src.                          arXiv:2412.08629

    Written as z_src + (z_edit - x_src), so that an edit that still is the source asks in the source's own point.
    """
    return source + (edited - clean)


def flow_edit_step(edited: Tensor, target: Tensor, source: Tensor, t: float, t_next: float) -> Tensor:
    """z_edit' = z_edit + (t' - t) (v_tar(z_tar, t) - v_src(z_src, t)).                                arXiv:2412.08629

    target, source: the two velocities, or their means over several draws of the noise in z_src. No walk up to noise;
    two equal velocities leave the picture as it was to the last bit.
    """
    return edited + (t_next - t) * (target - source)
