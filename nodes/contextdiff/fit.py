"""How a context adapter learns: a sampler function for the host that trains in place of sampling."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import host, training
from ..settings import Settings
from .adapter import ContextAdapter
from .bias import PAPER
from .condition import told
from .config import CLIP_PREDICTED, LATENT
from .objective import CLEAN, PREDICTED, SEEN, Objective, PickRows
from .sight import Sight
from .validation import Validation, Validator

FROZEN, JOINT = "frozen", "LoRA on to_q"
QUERIES, ALL_ATTENTION = "queries", "all attention"
PRINTED = "paper"  # the preset
SLOWEST = 0.01  # share of the learning rate that is left at the end


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How an adapter is trained; see PalimpsestTrainContextAdapter for what each does.

    PRESETS: "paper" is what arXiv:2402.16627 prints, from which it departs in what stays here of the model (its
    convolutions and feed-forwards do not learn) and in what the paper leaves open (steps, rate, weight of the loss).
    """

    PRESETS: ClassVar = {
        PRINTED: {"size": "large", "formula": PAPER, "train_on": CLEAN, "train_unet": JOINT,
                  "trained_with": ALL_ATTENTION, "adapter": CLIP_PREDICTED},
    }  # fmt: skip

    size: str = "small"
    video: bool = False
    formula: str = PAPER
    train_on: str = PREDICTED
    steps: int = 200
    learning_rate: float = 1e-4
    batch_size: int = 2
    train_unet: str = FROZEN
    lora_rank: int = 8
    seed: int = 0
    validate_every: int = 50
    min_snr_gamma: float = 5.0
    checkpointing: bool = False
    adapter: str = LATENT
    trained_with: str = QUERIES


@dataclass
class History(training.History):
    """What a training was like; a picture's place in the schedule is its noise angle."""

    validations: list[Validation] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Trained:
    """An adapter, the LoRA it was trained with (empty for a frozen U-Net), and how the training went."""

    adapter: ContextAdapter
    lora: dict[str, Tensor]
    history: History


class FitAdapter:
    """A host sampler function: AdamW on phi (and the LoRA), one draw a step. The result is in `network` and `history`.

    latents (N, C, H, W) in the model's own scale, on the CPU.
    """

    def __init__(
        self,
        network: nn.Module,
        latents: Tensor,
        pick: PickRows,
        lora: training.Factors | None,
        settings: TrainSettings,
        watch: training.Watch,
        sight: Sight | None = None,
    ):
        self.sight = sight
        self.network, self.latents, self.pick, self.lora = network, latents, pick, lora
        self.settings, self.watch = settings, watch
        self.history = History()
        self.generator = training.generator(settings.seed)

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x gives device and dtype and is returned unchanged."""
        objective = self.objective(model, x, extra_args)
        self.good = training.GoodWeights(self.learned())
        pictures = min(self.settings.batch_size, len(self.latents))
        validator = Validator(objective, list(range(pictures)), self.settings.seed)
        try:
            self.steps(objective, validator)
        except training.NotANumber as reason:
            self.history.stopped = f"{reason}: earlier weights are kept"
            self.restore()
            self.history.validations.append(validator.measure(self.history.kept)[0])
        return x

    def objective(self, model: Any, x: Tensor, arguments: dict | None) -> Objective:
        """The loss in this run of the host's, with everything that learns brought to its device."""
        self.network.to(x.device)
        if self.lora is not None:
            self.lora.to(x.device)
        text = told(self.network.config, model.inner_model.conds["positive"][0]).to(x.device, torch.float32).clone()
        return Objective(
            network=self.network,
            latents=self.latents,
            text=text,
            model=model,
            arguments=arguments or {},
            pick=self.pick,
            formula=self.settings.formula,
            min_snr_gamma=self.settings.min_snr_gamma,
            sight=self.sight,
        )

    def learned(self) -> list[Tensor]:
        """Everything that the optimiser changes."""
        return [*self.network.parameters(), *(self.lora.parameters() if self.lora else ())]

    def steps(self, objective: Objective, validator: Validator) -> None:
        """All steps, with validations now and then and at the end. Raises NotANumber."""

        optimiser = training.adamw(self.learned(), self.settings.learning_rate)
        fading = torch.optim.lr_scheduler.LambdaLR(optimiser, self.rate)
        every = self.settings.validate_every
        for step, rows in enumerate(self.order()):
            host.stop_if_cancelled()
            if every and step and step % every == 0:
                self.validate(validator)
            self.step(objective, step, rows, optimiser)
            fading.step()
        self.validate(validator)

    def rate(self, step: int) -> float:
        """Share of the learning rate: half a cosine down, so that the last draws do not decide."""
        return SLOWEST + (1.0 - SLOWEST) * (0.5 + 0.5 * math.cos(math.pi * step / self.settings.steps))

    def order(self) -> Iterator[list[int]]:
        """Pictures of every step: all of them before any comes again; of a clip, frames in a row.

        Fewer pictures than a batch come several times a step, each time with other noise.
        """
        count, batch = len(self.latents), self.settings.batch_size
        left: list[int] = []
        for _ in range(self.settings.steps):
            if self.network.config.video:
                frames = min(batch, count)
                first = int(torch.randint(count - frames + 1, (), generator=self.generator))
                yield list(range(first, first + frames))
                continue
            while len(left) < batch:
                left += torch.randperm(count, generator=self.generator).tolist()
            rows, left = left[:batch], left[batch:]
            yield rows

    def levels(self, count: int) -> list[float]:
        """Shares of the schedule, spread evenly over a batch; the frames of a clip have one in common."""
        if self.network.config.video:
            return [float(torch.rand((), generator=self.generator))] * count
        slots = torch.randperm(count, generator=self.generator) + torch.rand(count, generator=self.generator)
        return (slots / count).tolist()

    def step(self, objective: Objective, step: int, rows: list[int], optimiser: torch.optim.Optimizer) -> None:
        """One step of the optimiser. Raises NotANumber before it changes anything; ValueError in the first step."""
        draw = objective.draw(rows, self.levels(len(rows)), self.generator)
        losses, denoised = objective.losses(draw, SEEN[self.settings.train_on](draw, objective.predict))
        optimiser.zero_grad(set_to_none=True)
        # By the number of elements and back: half-precision gradients within the U-Net stay clear of underflow.
        scale, learned = draw.clean[0].numel(), self.learned()
        (losses.mean() * scale).backward()
        training.divide_gradients(learned, scale)
        size, found = float(training.clip_gradients(learned)), losses.detach().cpu()
        fault = training.nan_error("for this picture", "the prompt and the picture") if step == 0 else None
        training.require_finite(step, size, found, fault)
        self.good.keep()
        optimiser.step()
        self.history.note(step, map(draw.kind.angle, draw.sigmas), found)
        self.watch.tell(f"step {step + 1} of {self.settings.steps}, loss {self.history.recent():.4f}")
        self.watch.show(step, denoised.detach())

    def restore(self) -> None:
        """Go back to the weights that last gave a finite loss."""
        self.good.restore()
        self.history.kept -= 1

    def validate(self, validator: Validator) -> None:
        """Measure the adapter as it is, note it, and show what it draws. Raises NotANumber."""
        step = self.history.kept
        self.watch.tell(f"validating after step {step}")
        found, pictures = validator.measure(step)
        if not found.finite:
            raise training.NotANumber(f"the adapter gave no number after step {step}")
        self.history.validations.append(found)
        self.watch.show(step - 1, pictures)

    def result(self) -> Trained:
        """What has been learned, as sockets carry it."""
        settings, history = self.settings, self.history
        info = {
            "formula": settings.formula,
            "train_on": settings.train_on,
            "steps": history.steps,
            "learning_rate": settings.learning_rate,
            "loss": history.recent(),
            "train_unet": settings.train_unet,
            **({"trained_with": settings.trained_with} if settings.trained_with != QUERIES else {}),
            "seed": settings.seed,
        }
        if history.validations:
            last = history.validations[-1]
            info |= {"loss_x0": last.clean, "loss_x0_hat": last.predicted, "sampled": last.sampled}
        network = copy.deepcopy(self.network).cpu()
        lora = training.unet_file(self.lora) if self.lora else {}
        return Trained(ContextAdapter.of(network, info, sight=self.sight), lora, history)
