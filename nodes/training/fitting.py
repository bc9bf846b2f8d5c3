"""How weights beside or within a model of the host learn: a sampler function that trains in place of sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.lora import rate_share
from .. import host
from .finite import GoodWeights, NotANumber, nan_error, require_finite
from .history import History as Course
from .optimise import clip_gradients, divide_gradients
from .optimisers import Learning, Optimiser, groups_of, optimiser_for, restore, state_of
from .pictures import Order
from .watch import Watch


@dataclass(frozen=True)
class Preview:
    """What the model draws by now. epoch: after how many of them, or of steps; latents in the model's scale."""

    epoch: int
    latents: list[Tensor]


@dataclass(frozen=True, eq=False)
class Learned:
    """What is learned at some step of a training.

    factors: by part of the model, such as "unet". epoch: how many of them were taken, or of steps where these are
    counted. state: what resuming takes, made when it is wanted. final: nothing will follow.
    """

    factors: dict[str, Learning]
    step: int
    epoch: int
    state: Callable[[], dict[str, Tensor]]
    final: bool = False


@dataclass
class History(Course):
    """What a training was like; a picture's place is its share of the schedule, 1 being all noise."""

    previews: list[Preview] = field(default_factory=list)
    optimiser: str = ""


class Fitting:
    """A host sampler function: one step of the optimiser after the other. The result is in `factors` and `history`.

    A training says in `losses` how it asks the model and in `draw` what it previews. factors: what is trained of each
    part, with the part's rate in `rates`. watch.save is given what was Learned when files are wanted, and at the end.
    state: of an earlier training's Learned, to go on from.
    """

    fault: ClassVar[tuple[str, str]] = ("for these pictures", "the captions and the pictures")

    def __init__(
        self,
        order: Order,
        factors: dict[str, Learning],
        settings: Any,
        *,
        rates: Mapping[str, float],
        watch: Watch,
        state: dict[str, Tensor] | None = None,
    ):
        self.order, self.factors, self.settings, self.rates = order, factors, settings, rates
        self.watch, self.state, self.history = watch, state or {}, History()
        self.scale = max(example.latent.numel() for example in order.examples)
        self.optimiser: Optimiser | None = None
        self.step = self.history.before = int(self.state.get("step", 0))

    @property
    def steps(self) -> int:
        """Of the optimiser, from the first to the last."""
        return self.settings.steps

    @property
    def unit(self) -> int:
        """So many of them are one of what files and previews are counted in."""
        return 1

    def losses(self, step: int, batch: int, rows: list[int]) -> tuple[Tensor, list[float]]:
        """(loss of each picture, its place in the schedule) of one batch."""
        raise NotImplementedError

    def draw(self) -> list[Tensor]:
        """What is previewed."""
        raise NotImplementedError

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x gives the device and is returned unchanged."""
        self.model, self.arguments, self.device = model, extra_args or {}, x.device
        self.prepare()
        try:
            for step, batches in self.remaining():
                self.take(step, batches)
                self.after(step)
        except NotANumber as reason:
            self.history.stopped = f"{reason}: earlier weights are kept"
            self.good.restore()
        return x

    def prepare(self) -> None:
        """Bring what is trained to the device, and go on from an earlier state where there is one."""
        for factors in self.factors.values():
            factors.to(self.device)
        self.optimiser = optimiser_for(groups_of(self.factors, self.rates), self.settings)
        self.history.optimiser = self.optimiser.name
        if self.state:
            self.require_fitting()
            parts = {key.removeprefix("optimiser."): v for key, v in self.state.items() if key.startswith("optimiser.")}
            with torch.no_grad():
                for name, tensor in self.named().items():
                    tensor.copy_(self.state[f"factor.{name}"])
            restore(self.optimiser.steps, parts)
        self.good = GoodWeights(list(self.named().values()))

    def require_fitting(self) -> None:
        """Raise ValueError where the state to go on from is of another model."""
        for name, tensor in self.named().items():
            found = self.state.get(f"factor.{name}")
            if found is None or found.shape != tensor.shape:
                raise ValueError(
                    f"the training to resume was made with another model (its {name} is "
                    f"{'missing' if found is None else tuple(found.shape)}, here it is {tuple(tensor.shape)}): connect "
                    "the one that it was made with."
                )

    def named(self) -> dict[str, Tensor]:
        """Every trained tensor by its part and name."""
        return {f"{part}.{name}": t for part, found in self.factors.items() for name, t in found.named().items()}

    def remaining(self) -> Iterator[tuple[int, list[list[int]]]]:
        """(step, its batches), from the first that was not taken yet."""
        each, first = self.order.steps_per_epoch, self.step
        for epoch in count(first // each):
            for step, batches in enumerate(self.order.epoch(epoch), epoch * each):
                if step >= self.steps:
                    return
                if step >= first:
                    yield step, batches

    # ---- one step

    def take(self, step: int, batches: list[list[int]]) -> None:
        """One step of the optimiser. Raises NotANumber before it changes anything; ValueError in the first steps."""
        optimiser, tensors = self.optimiser.steps, list(self.named().values())
        self.set_rates(step)
        optimiser.zero_grad(set_to_none=True)
        losses, places = [], []
        for number, rows in enumerate(batches):
            host.stop_if_cancelled()
            found, levels = self.losses(step, number, rows)
            # By the number of elements and back: half-precision gradients within the model stay clear of underflow.
            (found.sum() * self.weight(rows, batches) * self.scale).backward()
            losses.append(found.detach().cpu())
            places += levels
        divide_gradients(tensors, self.scale)
        size, found = float(clip_gradients(tensors)), torch.cat(losses)
        require_finite(step, size, found, nan_error(*self.fault) if self.history.kept == 0 else None)
        self.good.keep()
        optimiser.step()
        self.step = step + 1
        self.history.note(step, places, found)
        self.watch.tell(f"step {step + 1} of {self.steps}, loss {self.history.recent():.4f}")
        self.watch.show(step, None)

    def weight(self, rows: list[int], batches: list[list[int]]) -> float:
        """What each picture of one of a step's batches counts: together they count one."""
        return 1.0 / sum(map(len, batches))

    def set_rates(self, step: int) -> None:
        """Each part's learning rate in a step."""
        settings = self.settings
        pace = {"schedule": settings.schedule, "warm_up": settings.warm_up, "cycles": settings.cycles}
        for group in self.optimiser.steps.param_groups:
            group["lr"] = group["start"] * rate_share(step, self.steps, **pace)

    # ---- after a step

    def after(self, step: int) -> None:
        """Files and previews where they are asked for."""
        if (step + 1) % self.unit:
            return
        done, last, settings = (step + 1) // self.unit, step + 1 == self.steps, self.settings
        if settings.save_every and done % settings.save_every == 0 and not last:
            self.watch.save(self.learned())
        if settings.preview_every and (done % settings.preview_every == 0 or last):
            self.history.previews.append(Preview(done, self.draw()))
            self.watch.show(step, self.history.previews[-1].latents[0])

    def learned(self, final: bool = False) -> Learned:
        """What has been learned by now."""
        return Learned(self.factors, self.step, self.step // max(1, self.unit), self.snapshot, final)

    def rescue(self) -> None:
        """Keep what was learned: weights, optimiser and step belong together, so that it can go on from here."""
        if self.history.kept > 0:
            self.watch.save(self.learned(final=True))

    def snapshot(self) -> dict[str, Tensor]:
        """What resuming takes: everything else follows from the settings and the pictures."""
        found = {f"factor.{name}": tensor.detach().cpu().clone() for name, tensor in self.named().items()}
        found |= {f"optimiser.{name}": value for name, value in state_of(self.optimiser.steps).items()}
        return found | {"step": torch.tensor(self.step)}
