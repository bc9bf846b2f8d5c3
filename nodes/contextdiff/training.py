"""Training a context adapter: ContextDiff's loss (arXiv:2402.16627, eq. 6) through the host's U-Net."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.contextdiff import noise_angle
from .. import host
from ..host import checkpointing as recompute
from ..host import gradient as tuning_runtime
from .adapter import AdapterConfig, ContextAdapter, ContextNetwork
from .objective import PREDICTED, SEEN, Objective, PickRows, one_prompt_per_picture
from .query_lora import QueryLora
from .sampling import PAPER
from .validation import Validation, Validator, chance_of, verdict

TECHNIQUE = "Train Context Adapter"
FROZEN, JOINT = "frozen", "LoRA on to_q"
CLIP_NORM, WEIGHT_DECAY = 1.0, 1e-2  # as the authors' released configuration has them
SLOWEST = 0.01  # share of the learning rate that is left at the end

Show = Callable[[int, Tensor], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class TrainSettings:
    """How an adapter is trained; see PalimpsestTrainContextAdapter for what each does."""

    size: str = "small"
    video: bool = False
    formula: str = PAPER
    train_on: str = PREDICTED
    steps: int = 200
    learning_rate: float = 5e-4
    batch_size: int = 2
    train_unet: str = FROZEN
    lora_rank: int = 8
    seed: int = 0
    validate_every: int = 50
    snr_limit: float = 5.0
    save_memory: bool = False


@dataclass
class History:
    """What a training was like.

    points: (step, noise angle, weighted loss) of every picture of every step. kept: steps that the weights have taken.
    stopped: why it ended early, if it did.
    """

    losses: list[float] = field(default_factory=list)
    points: list[tuple[int, float, float]] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    stopped: str = ""
    kept: int = 0

    def recent(self) -> float:
        """Mean loss of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / max(1, len(last))


@dataclass(frozen=True, eq=False)
class Trained:
    """An adapter, the LoRA it was trained with (empty for a frozen U-Net), and how the training went."""

    adapter: ContextAdapter
    lora: dict[str, Tensor]
    history: History


class NotANumber(ArithmeticError):
    """The loss, its gradient or a validation is not finite: the weights before are to be kept."""


class FitAdapter:
    """A host sampler function: AdamW on phi (and the LoRA), one draw a step. The result is in `network` and `history`.

    latents (N, C, H, W) in the model's own scale, on the CPU.
    """

    def __init__(
        self, network: ContextNetwork, latents: Tensor, pick: PickRows, lora: QueryLora | None,
        settings: TrainSettings, show: Show, tell: Tell,
    ):  # fmt: skip
        self.network, self.latents, self.pick, self.lora = network, latents, pick, lora
        self.settings, self.show, self.tell = settings, show, tell
        self.history, self.good = History(), []
        self.chance = chance_of(settings.seed)

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x gives device and dtype and is returned unchanged."""
        import comfy.model_management

        objective = self.objective(model, x, extra_args)
        optimiser = torch.optim.AdamW(self.learned(), self.settings.learning_rate, weight_decay=WEIGHT_DECAY)
        fading = torch.optim.lr_scheduler.LambdaLR(optimiser, self.rate)
        self.good = [t.detach().clone() for t in self.learned()]
        pictures = min(self.settings.batch_size, len(self.latents))
        validator, every = Validator(objective, list(range(pictures)), self.settings.seed), self.settings.validate_every
        try:
            for step, rows in enumerate(self.order()):
                comfy.model_management.throw_exception_if_processing_interrupted()
                if every and step and step % every == 0:
                    self.validate(validator)
                self.step(objective, step, rows, optimiser)
                fading.step()
            self.validate(validator)
        except NotANumber as reason:
            self.history.stopped = f"{reason}: earlier weights are kept"
            self.restore()
            self.history.validations.append(validator.measure(self.history.kept)[0])
        return x

    def objective(self, model: Any, x: Tensor, arguments: dict | None) -> Objective:
        """The loss in this run of the host's, with everything that learns brought to its device."""
        self.network.to(x.device)
        if self.lora is not None:
            self.lora.to(x.device)
        text = model.inner_model.conds["positive"][0]["cross_attn"].to(x.device, torch.float32).clone()
        settings = self.settings
        return Objective(
            self.network, self.latents, text, model, arguments or {}, self.pick, settings.formula, settings.snr_limit
        )

    def learned(self) -> list[Tensor]:
        """Everything that the optimiser changes."""
        return [*self.network.parameters(), *(self.lora.parameters() if self.lora else ())]

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
                first = int(torch.randint(count - frames + 1, (), generator=self.chance))
                yield list(range(first, first + frames))
                continue
            while len(left) < batch:
                left += torch.randperm(count, generator=self.chance).tolist()
            rows, left = left[:batch], left[batch:]
            yield rows

    def levels(self, count: int) -> list[float]:
        """Shares of the schedule, spread evenly over a batch; the frames of a clip have one in common."""
        if self.network.config.video:
            return [float(torch.rand((), generator=self.chance))] * count
        slots = torch.randperm(count, generator=self.chance) + torch.rand(count, generator=self.chance)
        return (slots / count).tolist()

    def step(self, objective: Objective, step: int, rows: list[int], optimiser: torch.optim.Optimizer) -> None:
        """One step of the optimiser. Raises NotANumber before it changes anything; ValueError in the first step."""
        draw = objective.draw(rows, self.levels(len(rows)), self.chance)
        losses, denoised = objective.losses(draw, SEEN[self.settings.train_on](draw, objective.predict))
        optimiser.zero_grad(set_to_none=True)
        # By the number of elements and back: half-precision gradients within the U-Net stay clear of underflow.
        scale, learned = draw.clean[0].numel(), self.learned()
        (losses.mean() * scale).backward()
        for tensor in learned:
            if tensor.grad is not None:
                tensor.grad.div_(scale)
        size = float(torch.nn.utils.clip_grad_norm_(learned, CLIP_NORM))
        found = losses.detach().cpu()
        if not (math.isfinite(size) and torch.isfinite(found).all()):
            if step == 0:
                raise ValueError(
                    "the model returns NaN for this picture: run it in another precision (start ComfyUI with "
                    "--bf16-unet or --fp32-unet), or look at the prompt and the picture."
                )
            raise NotANumber(f"the loss was no number at step {step + 1}")
        with torch.no_grad():
            for kept, tensor in zip(self.good, learned, strict=True):
                kept.copy_(tensor)
        optimiser.step()
        self.history.kept += 1
        self.history.losses.append(float(found.mean()))
        self.history.points += zip(itertools.repeat(step), map(noise_angle, draw.sigmas), found.tolist(), strict=False)
        self.tell(f"step {step + 1} of {self.settings.steps}, loss {self.history.recent():.4f}")
        self.show(step, denoised.detach())

    def restore(self) -> None:
        """Go back to the weights that last gave a finite loss."""
        with torch.no_grad():
            for tensor, kept in zip(self.learned(), self.good, strict=True):
                tensor.copy_(kept)
        self.history.kept -= 1

    def validate(self, validator: Validator) -> None:
        """Measure the adapter as it is, note it, and show what it draws. Raises NotANumber."""
        step = self.history.kept
        self.tell(f"validating after step {step}")
        found, pictures = validator.measure(step)
        if not found.finite:
            raise NotANumber(f"the adapter gave no number after step {step}")
        self.history.validations.append(found)
        self.show(step - 1, pictures)

    def result(self, before: ContextAdapter | None) -> Trained:
        """What has been learned, as sockets carry it; `before` is the adapter it began from."""
        settings, history = self.settings, self.history
        info = {
            "formula": settings.formula,
            "train_on": settings.train_on,
            "steps": history.kept + int((before.info if before else {}).get("steps", 0)),
            "learning_rate": settings.learning_rate,
            "loss": history.recent(),
            "train_unet": settings.train_unet,
            "seed": settings.seed,
        }
        if history.validations:
            last = history.validations[-1]
            info |= {"loss_x0": last.clean, "loss_x0_hat": last.predicted, "sampled": last.sampled}
        network = copy.deepcopy(self.network).cpu()
        return Trained(ContextAdapter.of(network, info), self.lora.file() if self.lora else {}, history)


def starting_network(
    model: Any, text_width: int, adapter: ContextAdapter | None, settings: TrainSettings
) -> ContextNetwork:
    """The network to train: a copy of an adapter's, or a new one. Raises ValueError for an adapter of another kind."""
    if adapter is None:
        config = AdapterConfig.for_model(model, text_width, settings.size, video=settings.video)
        return ContextAdapter.new(config, settings.seed).trainable()
    adapter.refuse_mismatch(model.model)
    config = adapter.config
    if config.text_width != text_width:
        raise ValueError(
            f"the context adapter was trained with prompts of {config.text_width} channels, this prompt has "
            f"{text_width}: connect the CLIP of the model family it was trained with."
        )
    if config.video != settings.video:
        have, want = ("a video", "off") if config.video else ("an image", "on")
        raise ValueError(
            f"the connected context adapter is {have} adapter and video is {want}: switch video, or leave "
            "context_adapter unconnected to begin a new one."
        )
    return adapter.trainable()


def check(model: Any, latent: Tensor) -> None:
    """Raise ValueError for models and latents that cannot be trained on."""
    import comfy.model_sampling

    host.require_unet(model, TECHNIQUE)
    if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
        raise ValueError(f"{TECHNIQUE} trains with diffusion models, the connected model is a flow-matching one.")
    if latent.ndim != 4:
        raise ValueError(
            f"the latent has {latent.ndim} dimensions: give pictures (batch, channels, height, width), a clip as a "
            "batch of frames."
        )
    if not torch.isfinite(latent).all():
        raise ValueError("the latent holds NaN: look at the VAE's precision (start ComfyUI with --fp32-vae).")


def patched_for_training(model: Any, pick: PickRows, lora: QueryLora | None, save_memory: bool) -> Any:
    """A clone of the model that lets a gradient through all of the U-Net."""
    from comfy.patcher_extension import WrappersMP

    patched, _ = tuning_runtime.prepare(model, host.AttentionLayer("input", 0, 0, 0), False)
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "palimpsest_context_training", pick)
    if lora is not None:
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "palimpsest_context_lora", lora)
    if save_memory:
        recompute.install(patched)
    return patched


def train(
    model: Any,
    latent: Tensor,
    positive: list,
    settings: TrainSettings,
    adapter: ContextAdapter | None = None,
    show: Show = lambda step, denoised: None,
    tell: Tell = lambda text: None,
    rescue: Callable[[Trained], None] = lambda trained: None,
) -> Trained:
    """Train a context adapter on the pictures of a LATENT (N, C, H, W), with the prompts that describe them.

    The loss and its gradient run through the host's guider and U-Net, so that LoRA and patches of other nodes act. The
    model and `adapter` are left as they were. rescue is given what was learned so far if the training is cancelled or
    fails. Raises ValueError for unusable inputs and a model that returns NaN.
    """
    check(model, latent)
    model = host.single_device(model)
    with torch.inference_mode(False):
        positive = one_prompt_per_picture(positive, len(latent))
        network = starting_network(model, positive[0][0].shape[-1], adapter, settings)
        latents = model.model.process_latent_in(latent.clone()).to("cpu", torch.float32)
        pick, joint = PickRows(len(latent)), settings.train_unet == JOINT
        lora = QueryLora(model.model.diffusion_model, settings.lora_rank, settings.seed) if joint else None
        patched = patched_for_training(model, pick, lora, settings.save_memory)
        fitting = FitAdapter(network, latents, pick, lora, settings, show, tell)
        start = latent[[row % len(latent) for row in range(settings.batch_size)]]  # the host makes room for as many
        levels = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
        finished = False
        try:
            host.sample(patched, fitting, start, sigmas=levels, positive=positive)
            finished = True
        finally:
            if not finished and fitting.history.kept > 1:
                fitting.restore()
                rescue(fitting.result(adapter))
    return fitting.result(adapter)


def describe(trained: Trained, settings: TrainSettings) -> str:
    """What was learned and whether it helps, in one line."""
    history, last = trained.history, trained.history.validations[-1]
    judged = verdict(settings.formula, settings.train_on, settings.train_unet == FROZEN, last)
    parts = [f"{history.kept} steps, loss {history.recent():.4f}", str(last), judged, history.stopped]
    return "; ".join(filter(None, parts))
