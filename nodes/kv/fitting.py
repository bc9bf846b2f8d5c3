"""KV Inversion, stage 2: psi_t fitted step by step along a trajectory, as a sampler function of the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.ddim import ddim_step
from ...kernels.kv_inversion import reconstruction_loss
from .. import host, training
from ..host.gradient import CachedBlocks, CachedPrefix, LateReader
from .psi import BetweenKeyframes, OneOfSeveral, Psi
from .settings import TuneSettings
from .store import FinishedSteps
from .tuned_attention import TuningState

# lambda and gamma weigh whole layers: at the embeddings' rate they swing by tenths an iteration.
SCALAR_RATE = 0.1

# Polishing by one or two iterations a step mends what learning from the stored latents alone leaves (drift).
POLISH = 2

Report = Callable[[int, int, float], None]  # (step, iteration, loss)


@dataclass(frozen=True)
class Rows:
    """Latents to be carried one step down, each with its target: x, target (R, C, H, W); levels (R,) each.

    goal (R,), the loss that ends the learning, stays on the CPU. flow: of a flow-matching model.
    """

    x: Tensor
    target: Tensor
    sigma: Tensor
    sigma_next: Tensor
    goal: Tensor
    step: int
    flow: bool = False

    def column(self, levels: Tensor) -> Tensor:
        """Levels (R,) as (R, 1, 1, 1) in x's dtype."""
        return levels.to(self.x.dtype)[:, None, None, None]

    @property
    def signal(self) -> Tensor:
        """sqrt(abar) of the level arrived at, (R, 1, 1, 1); 1 on a flow, whose x = (1 - t) x_0 + t eps is the z."""
        return self.column(torch.ones_like(self.sigma) if self.flow else torch.rsqrt(1.0 + self.sigma_next**2))


class FitTrajectory:
    """A host sampler function: stage 2 of KV Inversion. Fits psi_t at every step, then walks on with what it fitted.

    DDIM in x = z / sqrt(abar) is Euler's step, which is a flow's own way down.
    """

    def __init__(
        self,
        trajectory: host.Trajectory,
        state: TuningState,
        prefix: CachedPrefix | CachedBlocks,
        finished: FinishedSteps,
        settings: TuneSettings,
        report: Report,
    ):
        self.trajectory, self.state, self.prefix, self.settings = trajectory, state, prefix, settings
        self.finished, self.report = finished, report
        self.span = settings.span(trajectory.steps)
        self.losses: list[Tensor] = []
        self.iterations = 0
        self.predict: Callable[[Tensor, Tensor], Tensor] | None = None
        self.current: Rows | None = None
        self.device = torch.device("cpu")

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_: Any
    ) -> Tensor:
        """x (B, C, H, W) at sigmas[0], the trajectory's noisiest latent. Returns the reconstruction.

        Of a model for clips a picture is one frame, (B, C, 1, H, W).
        """
        self.predict, self.device, given = functools.partial(model, **(extra_args or {})), x.device, x
        if x.ndim == 5:
            self.predict, x = of_one_frame(self.predict), x.squeeze(2)
        first, last = self.span
        outside = [range(i, i + 1) for i in (*range(first), *range(last, self.trajectory.steps))]
        psi = None
        for group in sorted([*outside, *self.settings.groups(first, last)], key=lambda steps: steps.start):
            several = self.fit_group(group, psi, x.device) if len(group) > 1 else None
            for number, step in enumerate(group):
                rows = self.rows(range(step, step + 1), x)
                if not first <= step < last:
                    x, denoised = self.walk(rows)
                else:
                    x, denoised, psi = self.learn(rows, psi, several, number)
                if callback is not None:
                    sigma = self.trajectory.sigmas[step]
                    shown = {"x": host.in_dimensions_of(x, given)}
                    shown |= {"denoised": host.in_dimensions_of(denoised.detach(), given)}
                    callback({"i": step, "sigma": sigma, "sigma_hat": sigma, **shown})
        self.predict = self.current = None
        return host.in_dimensions_of(x, given)

    def learn(
        self, rows: Rows, psi: Psi | None, several: Psi | BetweenKeyframes | None, number: int
    ) -> tuple[Tensor, Tensor, Psi]:
        """One step of the span: (next latent, denoised, parameters to go on with); keeps what was learned.

        several: what fit_group learned for the group of steps, in which this is step `number`.
        """
        if not self.finished.layers or self.settings.needs_source:
            self.walk(rows)
            self.finished.note_layers(self.state)
        if isinstance(several, BetweenKeyframes):
            x, denoised = self.walk(rows, OneOfSeveral(several, number))
            if number + 1 < several.steps:
                return x, denoised, psi
            psi = several.after
        elif several is not None:
            pictures = self.trajectory.pictures
            psi = several.map(lambda t: t[number * pictures : (number + 1) * pictures].clone())
            x, denoised = self.fit(psi, rows, min(POLISH, self.settings.inner_steps))
        else:
            psi = self.begin(psi, 1)
            x, denoised = self.fit(psi, rows, self.settings.inner_steps)
        self.finished.keep(rows.step, psi, self.state)
        return x, denoised, psi

    def advance(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(next latent, denoised) of one DDIM step (eq. 4)."""
        if rows is not self.current:
            self.prefix.forget()
            self.current = rows
        denoised = self.predict(rows.x, rows.sigma)
        return ddim_step(rows.x, denoised, rows.column(rows.sigma), rows.column(rows.sigma_next)), denoised

    def rows(self, steps: range, x: Tensor) -> Rows:
        """One step from the latent x, or several steps at once from their latents (step-major)."""
        t, pictures, device = self.trajectory, self.trajectory.pictures, x.device

        def rowed(values: list[float]) -> Tensor:
            return torch.tensor(values).repeat_interleave(pictures)

        return Rows(
            x=x,
            target=t.latents[steps.start + 1 : steps.stop + 1].flatten(0, 1).to(device),
            sigma=rowed([t.sigmas[i] for i in steps]).to(device),
            sigma_next=rowed([t.sigmas[i + 1] for i in steps]).to(device),
            goal=rowed([self.settings.converged(i) for i in steps]),
            step=steps.start,
            flow=t.flow,
        )

    def walk(self, rows: Rows, psi: OneOfSeveral | None = None) -> tuple[Tensor, Tensor]:
        """(next latent, denoised) with parameters as they are; None: with the network as it is."""
        self.state.psi = psi
        with torch.no_grad():
            return self.advance(rows)

    def begin(self, psi: Psi | None, times: int) -> Psi:
        """Parameters for the next step, or for `times` steps: what the last one learned (warm start), or fresh ones."""
        warm = psi is not None and self.settings.warm_start
        if warm and not self.settings.weights_only:
            return psi.repeated(times)
        source = dict(self.state.sources) if self.settings.weights_only else None
        fresh = Psi(
            self.finished.layers, times * self.trajectory.pictures, self.device, rank=self.settings.rank, source=source
        )
        if warm:
            fresh.scalars = psi.repeated(times).scalars
        return fresh

    def fit_group(self, group: range, psi: Psi | None, device: torch.device) -> Psi | BetweenKeyframes:
        """Learn several steps at once, each from the trajectory's own latent (teacher forcing)."""
        latents = self.trajectory.latents[group.start : group.stop].to(device)
        rows = self.rows(group, latents.flatten(0, 1))
        self.walk(rows)
        self.finished.note_layers(self.state)
        if self.settings.keyframes == 1:
            found = self.begin(psi, len(group))
        else:
            self.walk(self.rows(group[-1:], latents[-1]))  # the new keyframe's own source
            found = BetweenKeyframes(psi, self.begin(psi, 1), len(group))
        self.fit(found, rows, self.settings.inner_steps)
        return found

    def fit(self, psi: Psi | BetweenKeyframes, rows: Rows, iterations: int) -> tuple[Tensor, Tensor]:
        """Minimise eq. 3 over psi from the latents of `rows`; leaves each row's best psi, returns its z_{t-1}."""

        self.state.psi = psi
        optimiser, mask = self.optimiser(psi, rows), self.loss_mask(rows.x)
        reader, best, goal = LateReader(), None, psi.per_row(rows.goal)
        goal_on_device = goal.to(rows.x.device)
        for iteration in range(iterations + 1):
            host.stop_if_cancelled()
            last = iteration == iterations
            with torch.set_grad_enabled(not last):
                x_next, denoised = self.advance(rows)
                losses = psi.per_row(reconstruction_loss(x_next, rows.target, rows.signal, mask))
            with torch.no_grad():
                best = better(best, psi, x_next, losses)
            arrived = reader.read(best.losses)
            if arrived is not None:
                self.tell(rows.step, iteration, arrived)
            if last or (arrived is not None and bool((arrived <= goal).all())):
                break
            optimiser.zero_grad(set_to_none=True)
            # The sum over elements, not the mean: half-precision gradients stay clear of underflow, and Adam is
            # scale-free.
            unfinished = losses * (best.losses > goal_on_device)
            unfinished.sum().mul(rows.x[0].numel()).backward()
            optimiser.step()
            self.iterations += 1
        best.restore(psi)
        self.losses.append(best.losses.mean())
        return best.x, denoised.detach()

    def optimiser(self, psi: Psi | BetweenKeyframes, rows: Rows) -> torch.optim.Optimizer:
        """Adam over psi's tensors, which want a gradient from here on."""
        for tensor in psi.tensors():
            tensor.requires_grad_(True)
        embeddings, weights = psi.learnable()
        rate = self.settings.rate(rows.step, self.trajectory.steps)
        groups = [{"params": embeddings, "lr": rate}] if embeddings else []
        groups.append({"params": weights, "lr": rate * SCALAR_RATE})
        return torch.optim.Adam(groups, fused=rows.x.device.type in ("cpu", "cuda"))

    def tell(self, step: int, iteration: int, losses: Tensor) -> None:
        """Report an iteration. Raises ValueError for NaN."""
        if not bool(torch.isfinite(losses).all()):
            raise training.nan_error(f"at step {step + 1} of the tuning", "the prompt and the picture")
        self.report(step, iteration, float(losses.mean()))

    def loss_mask(self, x: Tensor) -> Tensor | None:
        """The mask on the latent grid, (R, 1, h, w); None without a mask."""
        if self.state.mask is None:
            return None
        small = host.picture_rows(self.state.mask, self.trajectory.pictures, *x.shape[-2:]).to(x)
        return small.repeat(len(x) // len(small), 1, 1, 1)


def of_one_frame(predict: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A model for clips, asked for pictures (R, C, H, W)."""
    return lambda x, sigma: predict(x.unsqueeze(2), sigma).squeeze(2)


@dataclass
class Best:
    """Per row, the parameters, latent and loss of the best iteration yet."""

    tensors: list[Tensor]
    x: Tensor
    losses: Tensor

    def restore(self, psi: Psi | BetweenKeyframes) -> None:
        """Put the parameters back; they want no gradient any more."""
        with torch.no_grad():
            for tensor, value in zip(psi.tensors(), self.tensors, strict=True):
                tensor.requires_grad_(False).copy_(value)


def better(best: Best | None, psi: Psi | BetweenKeyframes, x: Tensor, losses: Tensor) -> Best:
    """The better of two iterations, row by row. NaN never wins, but begins."""
    if best is None:
        return Best([t.detach().clone() for t in psi.tensors()], x.detach(), losses.detach())
    won = losses < best.losses
    for kept, new in zip(best.tensors, psi.tensors(), strict=True):
        torch.where(won.view(-1, *(1,) * (new.ndim - 1)), new.detach(), kept, out=kept)
    if len(x) == len(won):
        best.x = torch.where(won.view(-1, 1, 1, 1), x.detach(), best.x)
    best.losses = torch.where(won, losses.detach(), best.losses)
    return best
