"""How a multimodal encoder learns: a sampler function for the host that trains in place of sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....kernels.denoising_loss import velocity_loss
from ....kernels.token_alignment import token_error
from ... import host, training
from ...host.gradient import LateReader
from ..dataset import STAGES, Dataset
from ..encoder import POOLED_WIDTH, MultimodalEncoder
from ..interleaved import Prompt
from ..vlm import Hidden
from . import saying
from .course import ALIGN, DRAW, READ, Course
from .drawing import ddim, sample_prompts
from .encoding import Encoders, trained_cells
from .gradient import TECHNIQUE, UNet
from .learner import Learner, Process, Snapshot
from .lessons import Lesson, Lessons
from .lora import language_checkpointing
from .settings import SNR_PLUS_1, TrainSettings, stage_tokens

READ_AHEAD = 32  # batches whose pictures and prompts are encoded before the U-Net is loaded for them
NAN_STEPS = 3  # steps in a row that may fail before the training stops; their gradients are never applied


@dataclass
class History(training.History):
    """What a training was like. failed: the last steps, whose losses were no numbers. course: which lesson each was."""

    failed: int = 0
    course: Course = field(default_factory=Course)

    def by_lesson(self) -> dict[str, training.History]:
        """The losses of each lesson that steps were taken of; `before` are the steps before it."""
        found: dict[str, training.History] = {}
        for part in self.course.parts(self.before, self.before + len(self.losses), max(1, len(self.losses))):
            losses = self.losses[part.start - self.before : part.stop - self.before]
            found[self.course.lesson(part.start)] = training.History(losses, before=part.start, kept=len(losses))
        return found

    def recent(self) -> float:
        """Mean loss of the last tenth of the steps of the present lesson."""
        if not self.course.before_drawing:
            return super().recent()
        return next(reversed(self.by_lesson().values()), training.History()).recent()


class Fit:
    """A host sampler function that trains. Every call of it takes the steps that `ahead` has prepared.

    state: of an earlier training's Snapshot, to go on from. watch.save is given Snapshots.
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        encoder: MultimodalEncoder,
        dataset: Dataset,
        settings: TrainSettings,
        *,
        clip: Any,
        state: dict[str, Tensor] | None,
        process: Process,
        watch: training.Watch,
    ):
        self.settings, self.watch, self.vlm = settings, watch, encoder.vlm
        own = training.loss_of(model, TECHNIQUE)
        self.error = velocity_loss if settings.weighting == SNR_PLUS_1 else own
        self.sigmas = model.get_model_object("model_sampling").sigmas.detach().float().cpu().clone()
        tokens = stage_tokens(self.vlm, settings)
        most = training.own_resolution(model)
        sizes = {i: trained_cells(dataset.records[i].size, most) for i in dataset.fitting(STAGES[settings.stage])}
        self.lessons = Lessons(dataset, settings, tokens, sizes, process.rank, process.world)
        self.learner = Learner(model, encoder, tokens, settings, process, state)
        self.unet = UNet(model, self.learner.unet, settings)
        self.encoders = Encoders(
            model=self.unet.host_model,
            vae=vae,
            vlm=self.vlm,
            clip=clip,
            dataset=dataset,
            sizes=sizes,
            pooled_output=settings.pooled_output,
            language_learns=self.learner.language is not None,
            speaker=saying.Speaker(self.unet.host_model, clip),
        )
        self.course = settings.course
        self.history, self.late, self.ready = History(course=self.course), LateReader(), False
        self.loss_of: dict[str, Callable[[Lesson], Tensor]]
        self.loss_of = {ALIGN: self.alignment, READ: self.reading, DRAW: self.losses}
        self.waiting: list[tuple[int, Tensor]] = []
        self.samples: list[Tensor] = []
        self.unsaved = ""

    # ---- before the U-Net is loaded

    def start(self) -> None:
        """Get what learns ready, and choose the prompts whose pictures are shown."""
        import comfy.model_management

        self.device = comfy.model_management.get_torch_device()
        self.history.before = self.learner.start(self.device)
        self.ready = True
        self.shown, self.shown_hidden = sample_prompts(self.lessons), []
        for record, _ in self.shown:  # now, for no other model may be loaded beside the U-Net while that runs
            self.encoders.latent(record)
        self.encoders.read_words([(), *(prompt for _, prompt in self.shown)])
        if self.learner.language is None:
            self.shown_hidden = [self.encoders.hidden(((), prompt)) for _, prompt in self.shown]

    @property
    def end(self) -> int:
        """The number of the step behind the last."""
        return self.course.end(self.history.before, self.settings.steps)

    def ahead(self, steps: Sequence[int]) -> list[tuple[int, list[Lesson]]]:
        """Some steps of one lesson, with everything encoded that other models than the U-Net encode."""
        lessons = []
        for step in steps:
            host.stop_if_cancelled()
            lessons.append(list(self.lessons.of_step(step)))
        return list(zip(steps, self.encoders.ahead(lessons, self.course.lesson(steps[0])), strict=True))

    # ---- while the U-Net is loaded

    def run(self) -> None:
        """All steps, a few at a time: in between, the host may exchange the U-Net for the other models."""
        self.start()
        language = self.learner.language
        with (
            training.added_by(language, self.vlm.model),
            language_checkpointing(self.vlm.text, language is not None and self.settings.checkpointing),
        ):
            most = max(1, READ_AHEAD // self.settings.gradient_accumulation)
            for part in self.course.parts(self.history.before, self.end, most):
                self.prepared = self.ahead(part)
                if self.course.lesson(part.start) == ALIGN:
                    self.take_steps()
                else:
                    self.run_in_sampler()
                if self.history.stopped:
                    break

    def run_in_sampler(self) -> None:
        """Take the steps that are prepared where the host samples, with the U-Net."""
        record = self.prepared[0][1][0].records[0]
        start = self.encoders.latent(record)[None].repeat(self.settings.batch_size, 1, 1, 1)
        nothing = {"pooled_output": torch.zeros(1, POOLED_WIDTH)}
        positive = [[torch.zeros(1, 1, self.learner.config.context_width), nothing]]
        levels = torch.tensor([float(self.sigmas[-1]), 0.0])
        host.sample(self.unet.patched(), self, start, sigmas=levels, positive=positive)

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x gives the device and is returned unchanged."""
        self.unet.running(model, extra_args or {})
        self.device = x.device
        self.take_steps()
        return x

    def take_steps(self) -> None:
        """The steps that are prepared."""
        for step, lessons in self.prepared:
            host.stop_if_cancelled()
            self.step(step, lessons)
            self.look_back(step)
            if self.history.stopped:
                break

    def look_back(self, step: int) -> None:
        """What is due after a step: a preview, files, and at the end the samples."""
        settings, last = self.settings, step == self.end - 1
        drawn = self.course.lesson(step) != ALIGN  # which has no U-Net at hand
        due = drawn and settings.preview_every and (step + 1) % settings.preview_every == 0
        self.watch.show(step - self.history.before, self.drawn(0) if due else None)
        if self.history.stopped:
            return
        if settings.save_every and (step + 1) % settings.save_every == 0 and not last:
            self.read_losses()
            self.save_meanwhile()
        if last:
            self.read_losses()
            self.samples = [self.drawn(i) for i in range(len(self.shown))]

    def save_meanwhile(self) -> None:
        """Have what was learned by now saved; what cannot be is told with every step, and tried again later."""
        try:
            self.watch.save(self.snapshot())
            self.unsaved = ""
        except OSError as error:
            self.unsaved = f"; {error}"

    def read(self, hidden: Hidden | None, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
        """(context (B, L, C), token_mask (B, L), pooled (B, P)) of prompts, with a gradient; see tokens."""
        context, token_mask, learned = self.tokens(hidden, prompts)
        return context, token_mask, self.encoders.pooled(learned, prompts).to(self.device)

    def tokens(self, hidden: Hidden | None, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(context (B, L, C), token_mask (B, L), learned pooled (B, P) or None) of prompts, with a gradient.

        hidden: what the language model made of them; None: it is asked now, for it learns, too.
        """
        if hidden is None:
            hidden = self.vlm.hidden_states(prompts, gradient=True)
        token_mask = hidden.mask.to(self.device)
        context, learned = self.learner.network(hidden.states.to(self.device, torch.float32), token_mask)
        return context, token_mask, learned

    def alignment(self, lesson: Lesson) -> Tensor:
        """How far the connector's tokens are from what the text encoder says, of each prompt of a lesson, (B,)."""
        wanted, _, weight = (tensor.to(self.device) for tensor in saying.batch(lesson.said))
        context, token_mask, _ = self.tokens(lesson.hidden, lesson.prompts)
        return token_error(context, wanted, weight * token_mask)

    def reading(self, lesson: Lesson) -> Tensor:
        """The loss of each picture of a lesson, (B,), whose tokens are what a connector would say without mistakes."""
        wanted, token_mask, _ = (tensor.to(self.device) for tensor in saying.batch(lesson.said))
        unlearned = torch.zeros(len(wanted), POOLED_WIDTH)
        return self.denoising(lesson, wanted, token_mask, self.encoders.pooled(unlearned, lesson.prompts))

    def losses(self, lesson: Lesson) -> Tensor:
        """The loss of each picture of a lesson, (B,), whose tokens are the connector's."""
        return self.denoising(lesson, *self.read(lesson.hidden, lesson.prompts))

    def denoising(self, lesson: Lesson, context: Tensor, token_mask: Tensor, pooled: Tensor) -> Tensor:
        """The denoising loss of each picture of a lesson under its prompt's tokens, (B,)."""
        clean = torch.stack([self.encoders.latent(record) for record in lesson.records])
        noise = torch.stack([torch.randn(c.shape, generator=g) for c, g in zip(clean, lesson.generators, strict=True)])
        clean, noise = clean.to(self.device), noise.to(self.device)
        place = ((1.0 - lesson.shares) * len(self.sigmas)).long().clamp(0, len(self.sigmas) - 1)
        sigma = self.sigmas[place].to(self.device)
        noised = clean + sigma[:, None, None, None] * noise
        denoised = self.unet.predict(noised, sigma, context, token_mask, pooled.to(self.device))
        return self.error(denoised, clean, sigma, self.where(lesson))

    def where(self, lesson: Lesson) -> Tensor | None:
        """How much an error at each place of a lesson's pictures counts, (B, 1, h, w); None where all are alike."""
        weight = self.settings.crop_weight
        if weight == 1.0:
            return None
        inside = torch.stack([self.encoders.crops(record) for record in lesson.records])
        return (1.0 + (weight - 1.0) * inside).to(self.device)

    def step(self, step: int, lessons: Sequence[Lesson]) -> None:
        """One step of the optimisers over all lessons of it. A gradient that is no number changes nothing."""
        self.learner.begin(step, self.end)
        # By the number of elements and back: half-precision gradients within the U-Net stay clear of underflow.
        kind, found = self.course.lesson(step), []
        scale = 1 if kind == ALIGN else math.prod(self.encoders.latent(lessons[0].records[0]).shape)
        for lesson in lessons:
            losses = self.loss_of[kind](lesson)
            self.learner.process.backward(losses.mean() * (scale / len(lessons)))
            found.append(losses.detach())
        self.learner.finish(scale)
        self.waiting.append((step, torch.cat([lesson.shares for lesson in lessons])))
        self.note(self.late.read(torch.cat(found)))

    def read_losses(self) -> None:
        """Take in what is still on its way from the device."""
        self.note(self.late.rest())

    def note(self, losses: Tensor | None) -> None:
        """Write down the losses of a step that have arrived. Stops the training where they stay no numbers."""
        if losses is None:
            return
        (step, shares), history = self.waiting.pop(0), self.history
        finite = math.isfinite(history.note(step, shares.tolist(), losses))
        history.failed = 0 if finite else history.failed + 1
        self.watch.tell(f"{self.told_lesson(step)}loss {history.recent():.4f}{self.unsaved}")
        if history.failed >= NAN_STEPS:
            self.require_finite()
            history.stopped = f"the loss was no number for {NAN_STEPS} steps: the weights before them are kept"

    def told_lesson(self, step: int) -> str:
        """Where a training is, for a line that grows with it."""
        whole = f"step {step + 1} of {self.end}, "
        if not self.course.before_drawing:
            return whole
        begin, lesson = self.course.begin(step), self.course.lesson(step)
        steps = self.course.behind(step, self.end) - begin
        return f"{lesson} {step - begin + 1} of {steps} ({whole.removesuffix(', ')}), "

    def require_finite(self) -> None:
        """Raise ValueError where no loss was a number."""
        if not self.history.finite:
            raise training.nan_error("for these pictures", "the pictures of the dataset")

    # ---- what was learned

    @torch.no_grad()
    def drawn(self, number: int) -> Tensor:
        """The picture that the model draws for one of the shown prompts by now, (1, C, h, w) in its own scale."""
        record, prompt = self.shown[number]
        read = self.read(self.shown_hidden[number] if self.shown_hidden else None, ((), prompt))
        lengths = read[1].sum(1).tolist()
        rows = [
            (context[None, :length], token_mask[None, :length], pooled[None])
            for length, context, token_mask, pooled in zip(lengths, *read, strict=True)
        ]
        shape = (1, *self.encoders.latent(record).shape)
        noise = torch.randn(shape, generator=training.generator_at(self.settings.seed, "noise", number))
        return ddim(self.unet.predict, noise.to(self.device), self.sigmas, rows)

    def snapshot(self) -> Snapshot:
        """Everything that was learned up to now."""
        return self.learner.snapshot(
            {
                "steps": self.history.steps,
                "stage": self.settings.stage,
                "tokens": self.lessons.tokens,
                "loss": self.history.recent(),
                "pooled": self.settings.pooled_output,
                "seed": self.settings.seed,
                "dataset": self.lessons.dataset.folder.name,
            }
            | self.course.named()
        )
