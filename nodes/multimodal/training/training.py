"""Training a multimodal connector, and LoRAs beside it, through the host's U-Net: MUMU, arXiv:2406.18790, section 5.

What each step is shown is in multimodal_lessons, who prepares it in multimodal_encoding, what learns from it in
multimodal_learner, and how the U-Net takes part in multimodal_gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....kernels.ddim import ddim_step
from ... import host, plots
from ...host import gradient as tuning_runtime
from ..dataset.dataset import STAGES, Dataset
from ..encoder import POOLED_WIDTH, MultimodalEncoder, join
from ..interleaved import Picture, Prompt
from ..vlm import Hidden, with_lora
from . import lora as multimodal_lora
from .encoding import Encoders
from .gradient import TECHNIQUE, UNet, loss_of
from .learner import Learner, Process, Snapshot
from .lessons import CLIP_TEXT, Lesson, Lessons, TrainSettings, chance_of, stage_tokens

READ_AHEAD = 32  # steps whose pictures and prompts are encoded before the U-Net is loaded for them
NAN_STEPS = 3  # steps in a row that may fail before the training stops; their gradients are never applied
SAMPLES, SAMPLE_STEPS, SAMPLE_GUIDANCE = 4, 20, 6.0  # 6 is the paper's guidance, without a negative prompt


@dataclass
class History:
    """What a training was like. points: (step, place in the schedule, loss) of every picture; before: earlier steps."""

    losses: list[float] = field(default_factory=list)
    points: list[tuple[int, float, float]] = field(default_factory=list)
    before: int = 0
    bad: int = 0
    stopped: str = ""

    @property
    def steps(self) -> int:
        """Steps, with those of the trainings that this one goes on from."""
        return self.before + len(self.losses)

    def recent(self) -> float:
        """Mean loss of the last tenth of the steps."""
        last = [loss for loss in self.losses[-max(1, len(self.losses) // 10) :] if math.isfinite(loss)]
        return sum(last) / max(1, len(last))


@dataclass(frozen=True, eq=False)
class Trained:
    """A snapshot at the end of a training, the encoder with it, how it went, and what it draws."""

    snapshot: Snapshot
    encoder: MultimodalEncoder
    history: History
    samples: Tensor


class Fit:
    """A host sampler function that trains. Every call of it takes the steps that `ahead` has prepared."""

    def __init__(
        self, model: Any, vae: Any, encoder: MultimodalEncoder, dataset: Dataset, settings: TrainSettings,
        clip: Any = None, state: dict[str, Tensor] | None = None, process: Process | None = None,
        show: Callable[[int, Tensor | None], None] = lambda step, latent: None,
        tell: Callable[[str], None] = lambda text: None,
        save: Callable[[Snapshot], None] = lambda snapshot: None,
    ):  # fmt: skip
        self.settings, self.show, self.tell, self.save = settings, show, tell, save
        self.vlm, process = encoder.vlm, process or Process()
        self.error = loss_of(model)
        self.sigmas = model.get_model_object("model_sampling").sigmas.detach().float().cpu().clone()
        tokens = stage_tokens(self.vlm, settings)
        sizes = {i: tuple(n // 8 for n in dataset.records[i].size) for i in dataset.fitting(STAGES[settings.stage])}
        self.lessons = Lessons(dataset, settings, tokens, sizes, process.rank, process.world)
        self.learner = Learner(model, encoder, tokens, settings, process, state)
        self.unet = UNet(model, self.learner.unet, settings)
        learns = self.learner.language is not None
        self.encoders = Encoders(self.unet.host_model, vae, self.vlm, clip, dataset, settings.pooled, learns)
        self.history, self.late, self.ready = History(), tuning_runtime.LateReader(), False
        self.waiting: list[tuple[int, Tensor]] = []
        self.samples: list[Tensor] = []

    # ---- before the U-Net is loaded

    def start(self) -> None:
        """Get what learns ready, and choose the prompts whose pictures are shown."""
        import comfy.model_management

        self.device = comfy.model_management.get_torch_device()
        self.history.before = self.learner.start(self.device)
        self.ready = True
        stage, records, lessons = STAGES[self.settings.stage], list(self.lessons.sizes), self.lessons
        chosen = records[:: max(1, len(records) // SAMPLES)][:SAMPLES]
        self.shown = [
            (i, lessons.dataset.draw(i, stage, lessons.tokens, chance_of(self.settings.seed, "sample", i)))
            for i in chosen
        ]
        self.shown_hidden = []
        if self.learner.language is None:
            self.shown_hidden = [self.encoders.hidden(((), prompt)) for _, prompt in self.shown]

    def ahead(self, steps: Sequence[int]) -> list[tuple[int, list[Lesson]]]:
        """Some steps and their lessons, with everything encoded that other models than the U-Net encode."""
        import comfy.model_management

        prepared = []
        for step in steps:
            comfy.model_management.throw_exception_if_processing_interrupted()
            prepared.append((step, [self.encoders.ahead(lesson) for lesson in self.lessons.of_step(step)]))
        return prepared

    # ---- while the U-Net is loaded

    def run(self) -> None:
        """All steps, a few at a time: in between, the host may exchange the U-Net for the other models."""
        self.start()
        first, last = self.history.before, self.history.before + self.settings.steps
        language, again = self.learner.language, self.settings.again
        with (
            multimodal_lora.acting(self.vlm.model, language),
            multimodal_lora.run_again(self.vlm.text, language is not None and again),
        ):
            for begin in range(first, last, READ_AHEAD):
                self.prepared = self.ahead(range(begin, min(begin + READ_AHEAD, last)))
                if begin + READ_AHEAD >= last:
                    self.encoders.read_words([prompt for _, prompt in self.shown])
                record = self.prepared[0][1][0].records[0]
                start = self.encoders.latent(record)[None].repeat(self.settings.batch, 1, 1, 1)
                nothing = {"pooled_output": torch.zeros(1, POOLED_WIDTH)}
                positive = [[torch.zeros(1, 1, self.learner.config.context_width), nothing]]
                levels = torch.tensor([float(self.sigmas[-1]), 0.0])
                host.sample(self.unet.patched(), self, start, sigmas=levels, positive=positive)
                if self.history.stopped:
                    break

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x gives the device and is returned unchanged."""
        import comfy.model_management

        self.unet.running(model, extra_args or {})
        self.device, settings = x.device, self.settings
        last = self.history.before + settings.steps - 1
        for step, lessons in self.prepared:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.step(step, lessons)
            every = settings.preview_every
            drawn = self.drawn(0) if every and (step + 1) % every == 0 else None
            self.show(step - self.history.before, drawn)
            if self.history.stopped:
                return x
            if settings.save_every and (step + 1) % settings.save_every == 0 and step != last:
                self.read_losses(True)
                self.save(self.snapshot())
            if step == last:
                self.read_losses(True)
                self.samples = [self.drawn(i) for i in range(len(self.shown))]
        return x

    def read(self, hidden: Hidden | None, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
        """(context (B, L, C), which tokens are there (B, L), pooled (B, P)) of prompts, with a gradient.

        hidden: what the language model made of them; None: it is asked now, for it learns, too.
        """
        if hidden is None:
            hidden = self.vlm.hidden_states(prompts, gradient=True)
        there = hidden.mask.to(self.device)
        context, learned = self.learner.network(hidden.states.to(self.device, torch.float32), there)
        return context, there, self.encoders.pooled(learned, prompts).to(self.device)

    def losses(self, lesson: Lesson) -> Tensor:
        """The loss of each picture of a lesson, (B,)."""
        clean = torch.stack([self.encoders.latent(record) for record in lesson.records])
        noise = torch.stack([torch.randn(c.shape, generator=g) for c, g in zip(clean, lesson.noise, strict=True)])
        clean, noise = clean.to(self.device), noise.to(self.device)
        place = ((1.0 - lesson.shares) * len(self.sigmas)).long().clamp(0, len(self.sigmas) - 1)
        sigma = self.sigmas[place].to(self.device)
        noised = clean + sigma[:, None, None, None] * noise
        denoised = self.unet.predict(noised, sigma, *self.read(lesson.hidden, lesson.prompts))
        return self.error(denoised, clean, sigma)

    def step(self, step: int, lessons: Sequence[Lesson]) -> None:
        """One step of the optimisers over all lessons of it. A gradient that is no number changes nothing."""
        self.learner.begin(step)
        # By the number of elements and back: half-precision gradients within the U-Net stay clear of underflow.
        scale = math.prod(self.encoders.latent(lessons[0].records[0]).shape)
        found = []
        for lesson in lessons:
            losses = self.losses(lesson)
            self.learner.process.backward(losses.mean() * (scale / len(lessons)))
            found.append(losses.detach())
        self.learner.finish(scale)
        self.waiting.append((step, torch.cat([lesson.shares for lesson in lessons])))
        self.note(self.late.read(torch.cat(found)))

    def read_losses(self, now: bool) -> None:
        """Take in what is still on its way from the device."""
        if now and self.late.waiting is not None:
            copy, event = self.late.waiting
            self.late.waiting = None
            event.synchronize()
            self.note(copy)

    def note(self, losses: Tensor | None) -> None:
        """Write down the losses of a step that have arrived. Stops the training where they stay no numbers."""
        if losses is None:
            return
        step, shares = self.waiting.pop(0)
        loss, history = float(losses.mean()), self.history
        history.bad = 0 if math.isfinite(loss) else history.bad + 1
        history.losses.append(loss)
        history.points += zip(itertools.repeat(step), shares.tolist(), losses.tolist(), strict=False)
        self.tell(f"step {step + 1} of {history.before + self.settings.steps}, loss {history.recent():.4f}")
        if history.bad >= NAN_STEPS:
            if not any(map(math.isfinite, history.losses)):
                raise ValueError(
                    "the model returns NaN for these pictures: run it in another precision (start ComfyUI with "
                    "--bf16-unet or --fp32-unet), or look at the pictures of the dataset."
                )
            history.stopped = f"the loss was no number for {NAN_STEPS} steps: the weights before them are kept"

    @torch.no_grad()
    def drawn(self, number: int) -> Tensor:
        """The picture that the model draws for one of the shown prompts by now, (1, C, h, w) in its own scale: DDIM."""
        record, prompt = self.shown[number]
        context, there, pooled = self.read(self.shown_hidden[number] if self.shown_hidden else None, ((), prompt))
        places = torch.linspace(len(self.sigmas) - 1, 0, SAMPLE_STEPS).round().long()
        levels = [*self.sigmas[places].tolist(), 0.0]
        shape = (1, *self.encoders.latent(record).shape)
        x = torch.randn(shape, generator=chance_of(self.settings.seed, "noise", number)).to(self.device)
        x = x * math.sqrt(1.0 + levels[0] ** 2)
        counts = there.sum(1).tolist()
        rows = [
            (context[i : i + 1, :count], there[i : i + 1, :count], pooled[i : i + 1]) for i, count in enumerate(counts)
        ]
        for sigma, sigma_next in itertools.pairwise(levels):
            level = x.new_full((1,), sigma)
            null, full = (self.unet.predict(x, level, *row) for row in rows)
            x = ddim_step(x, null + SAMPLE_GUIDANCE * (full - null), sigma, sigma_next)
        return x.float().cpu()

    def snapshot(self) -> Snapshot:
        """Everything that was learned up to now."""
        return self.learner.snapshot(
            {
                "steps": self.history.steps,
                "stage": self.settings.stage,
                "tokens": self.lessons.tokens,
                "loss": self.history.recent(),
                "pooled": self.settings.pooled,
                "seed": self.settings.seed,
                "dataset": self.lessons.dataset.folder.name,
            }
        )


def train(
    model: Any,
    vae: Any,
    encoder: MultimodalEncoder,
    dataset: Dataset,
    settings: TrainSettings,
    clip: Any = None,
    state: dict[str, Tensor] | None = None,
    show: Callable[[int, Tensor | None], None] = lambda step, latent: None,
    tell: Callable[[str], None] = lambda text: None,
    save: Callable[[Snapshot], None] = lambda snapshot: None,
    process: Process | None = None,
) -> Trained:
    """Train the connector of an encoder, and LoRAs by choice, on a dataset of interleaved prompts.

    The loss and its gradient run through the host's guider and U-Net, so that LoRA and patches of other nodes act. The
    model, the vision-language model and the encoder's connector are left as they were. state: of a Snapshot, to go on
    from. save is given what was learned every save_every steps, at the end, and when the training is cancelled or
    fails. Raises ValueError for unusable inputs and for a model that returns NaN.
    """
    host.require_unet(model, TECHNIQUE)
    if settings.pooled == CLIP_TEXT and clip is None:
        raise ValueError("pooled_output 'CLIP text' needs a text encoder: connect clip, or choose 'zeros'.")
    with torch.inference_mode(False):
        fit = Fit(model, vae, encoder, dataset, settings, clip, state, process, show, tell, save)
        try:
            fit.run()
        finally:
            fit.read_losses(True)
            if fit.ready and any(map(math.isfinite, fit.history.losses)):
                snapshot = fit.snapshot()
                save(snapshot)
        return result(fit, snapshot, model, vae)


def result(fit: Fit, snapshot: Snapshot, model: Any, vae: Any) -> Trained:
    """What has been learned, as sockets carry it."""
    vlm, dataset = fit.vlm, fit.lessons.dataset
    if snapshot.language_lora:
        vlm = with_lora(vlm, snapshot.language_lora, 1.0, "the trained LoRA")
    rows = []
    for (record, prompt), latent in zip(fit.shown, fit.samples, strict=False):
        with torch.no_grad():
            picture = vae.decode(model.model.process_latent_out(latent))
        pictures = [part for part in prompt if isinstance(part, Picture)]
        cells = [
            *((each.pixels, each.name) for each in pictures),
            (picture.reshape(-1, *picture.shape[-3:])[0].float(), "drawn"),
            (dataset.picture(record), "the dataset's"),
        ]
        text = "".join(part if isinstance(part, str) else f"<{part.name}>" for part in prompt)
        rows.append(plots.Row(cells, text))
    return Trained(snapshot, join(vlm, snapshot.connector), fit.history, plots.sheet(rows))


def describe(trained: Trained) -> str:
    """What was trained and how it went, in one line."""
    info, history = trained.snapshot.info, trained.history
    first = history.losses[: max(1, len(history.losses) // 10)]
    parts = [
        f"{len(history.losses)} steps ({history.steps} in all), loss {sum(first) / len(first):.4f} at first, "
        f"{history.recent():.4f} at last",
        f"stage {info['stage']}, {info['tokens']} tokens a picture, pooled output {info['pooled']}",
        f"connector {trained.snapshot.connector.parameters / 1e6:.1f} M",
    ]
    for name, lora in (("U-Net", trained.snapshot.unet_lora), ("language", trained.snapshot.language_lora)):
        if lora:
            parts.append(f"{name} LoRA rank {info['rank']}, {sum(t.numel() for t in lora.values()) / 1e6:.2f} M")
    return "; ".join([*parts, *([history.stopped] if history.stopped else [])])
