"""How a LoRA learns: a sampler function for the host that trains in place of sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.lora import min_snr_weight, rate_share, with_offset
from .. import host, training
from .optimisers import Optimiser, groups_of, optimiser_for, restore, state_of
from .pictures import Example, Order
from .settings import LoRASettings
from .text import Prompts

PREVIEW_STEPS = 20


@dataclass(frozen=True)
class Preview:
    """What the model draws by now. epoch: after how many; latents in the model's scale, one for each prompt."""

    epoch: int
    latents: list[Tensor]


@dataclass(frozen=True, eq=False)
class Learned:
    """A LoRA at some step of its training.

    factors: by part, "unet" and "text". state: what resuming takes, made when it is wanted. final: nothing will follow.
    """

    factors: dict[str, training.Factors]
    step: int
    epoch: int
    state: Callable[[], dict[str, Tensor]]
    final: bool = False


@dataclass
class History(training.History):
    """What a training was like; a picture's place is its share of the schedule, 1 being all noise."""

    previews: list[Preview] = field(default_factory=list)
    optimiser: str = ""


class FitLoRA:
    """A host sampler function: one step of the optimiser after the other. The result is in `factors` and `history`.

    examples are in the model's own scale, on the CPU. preview: prompts to draw, at the size of `shape` (C, H, W).
    watch.save is given what was Learned after epochs whose files are wanted, and at the end.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        prompts: Prompts,
        factors: dict[str, training.Factors],
        settings: LoRASettings,
        *,
        loss: Callable[..., Tensor],
        velocity: bool,
        sigmas: Tensor,
        reader: training.ReadTokens,
        previewed: Sequence[str],
        watch: training.Watch,
        state: dict[str, Tensor] | None = None,
    ):
        self.examples, self.prompts, self.factors, self.settings = examples, prompts, factors, settings
        self.loss, self.velocity, self.sigmas, self.reader = loss, velocity, sigmas, reader
        self.previewed, self.watch, self.state = previewed, watch, state or {}
        self.order, self.history = Order(examples, settings), History()
        self.scale = max(example.latent.numel() for example in examples)
        self.optimiser: Optimiser | None = None
        self.step = self.history.before = int(self.state.get("step", 0))

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.settings.epochs * self.order.steps_per_epoch

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
        except training.NotANumber as reason:
            self.history.stopped = f"{reason}: earlier weights are kept"
            self.good.restore()
        return x

    def prepare(self) -> None:
        """Bring the factors to the device, and go on from an earlier state where there is one."""
        for factors in self.factors.values():
            factors.to(self.device)
        rates = {"unet": self.settings.learning_rate, "text": self.settings.text_rate}
        self.optimiser = optimiser_for(groups_of(self.factors, rates), self.settings)
        self.history.optimiser = self.optimiser.name
        if self.state:
            parts = {key.removeprefix("optimiser."): v for key, v in self.state.items() if key.startswith("optimiser.")}
            with torch.no_grad():
                for name, tensor in self.named().items():
                    tensor.copy_(self.state[f"factor.{name}"])
            restore(self.optimiser.steps, parts)
        self.good = training.GoodWeights(list(self.named().values()))

    def named(self) -> dict[str, Tensor]:
        """Every trained tensor by its part and name."""
        return {f"{part}.{name}": t for part, found in self.factors.items() for name, t in found.named().items()}

    def remaining(self) -> Iterator[tuple[int, list[list[int]]]]:
        """(step, its batches), from the first that was not taken yet."""
        each, first = self.order.steps_per_epoch, self.step
        for epoch in range(first // each, self.settings.epochs):
            for number, batches in enumerate(self.order.epoch(epoch)):
                if epoch * each + number >= first:
                    yield epoch * each + number, batches

    # ---- one step

    def take(self, step: int, batches: list[list[int]]) -> None:
        """One step of the optimiser. Raises NotANumber before it changes anything; ValueError in the first steps."""

        optimiser, tensors = self.optimiser.steps, list(self.named().values())
        self.set_rates(step)
        optimiser.zero_grad(set_to_none=True)
        losses, places = [], []
        count = sum(not self.examples[row].prior for rows in batches for row in rows)
        for number, rows in enumerate(batches):
            host.stop_if_cancelled()
            found, levels = self.losses(step, number, rows)
            weight = self.settings.prior_weight if self.examples[rows[0]].prior else 1.0 / count
            # By the number of elements and back: half-precision gradients within the model stay clear of underflow.
            (found.sum() * weight * self.scale).backward()
            losses.append(found.detach().cpu())
            places += levels
        training.divide_gradients(tensors, self.scale)
        size, found = float(training.clip_gradients(tensors)), torch.cat(losses)
        fault = training.nan_error("for these pictures", "the captions and the pictures")
        training.require_finite(step, size, found, fault if self.history.kept == 0 else None)
        self.good.keep()
        optimiser.step()
        self.step = step + 1
        self.history.note(step, places, found)
        self.watch.tell(f"step {step + 1} of {self.steps}, loss {self.history.recent():.4f}")
        self.watch.show(step, None)

    def set_rates(self, step: int) -> None:
        """Each part's learning rate in a step."""
        settings = self.settings
        pace = {"schedule": settings.schedule, "warm_up": settings.warm_up, "cycles": settings.cycles}
        for group in self.optimiser.steps.param_groups:
            group["lr"] = group["start"] * rate_share(step, self.steps, **pace)

    def losses(self, step: int, batch: int, rows: list[int]) -> tuple[Tensor, list[float]]:
        """(loss of each picture, its place in the schedule) of one batch."""
        settings, drawn = self.settings, training.generator_at(self.settings.seed, "step", step, batch)
        examples = [self.examples[row] for row in rows]
        mirrored = (torch.rand(len(rows), generator=drawn) < 0.5).tolist()
        silent = (torch.rand(len(rows), generator=drawn) < settings.caption_dropout).tolist()
        levels = (torch.rand(len(rows), generator=drawn) * len(self.sigmas)).long()
        turned = [m and example.mirrored is not None for m, example in zip(mirrored, examples, strict=True)]
        clean = torch.cat([e.mirrored if t else e.latent for t, e in zip(turned, examples, strict=True)])
        noise, offsets = (torch.randn(shape, generator=drawn) for shape in (clean.shape, clean.shape[:2]))
        noise = with_offset(noise, offsets, settings.noise_offset)
        sigma = self.sigmas[levels]
        noised = clean + sigma[:, None, None, None] * noise
        texts = ["" if s else e.caption for s, e in zip(silent, examples, strict=True)]
        denoised = self.predict(noised.to(self.device), sigma.to(self.device), texts)
        weight = min_snr_weight(sigma, settings.min_snr_gamma, self.velocity).to(self.device)
        found = weight * self.loss(denoised, clean.to(self.device), sigma.to(self.device), self.where(examples, turned))
        return found, ((levels + 1) / len(self.sigmas)).tolist()

    def where(self, examples: list[Example], turned: list[bool]) -> Tensor | None:
        """The weight of each place of the pictures, where any has a mask."""
        if all(example.where is None for example in examples):
            return None
        whole = torch.ones(1, 1, *examples[0].bucket)
        masks = [whole if example.where is None else example.where for example in examples]
        return torch.cat([m.flip(3) if t else m for m, t in zip(masks, turned, strict=True)]).to(self.device)

    def predict(self, x: Tensor, sigma: Tensor, texts: list[str]) -> Tensor:
        """The model's x_0 of noised pictures (B, C, H, W) at sigma (B,) and their texts, without guidance."""
        self.reader.context, self.reader.pooled = self.prompts.batch(texts, self.device)
        return self.model(x, sigma, **self.arguments)

    # ---- after a step

    def after(self, step: int) -> None:
        """Files and previews at the end of an epoch that asks for them."""
        each = self.order.steps_per_epoch
        if (step + 1) % each:
            return
        epoch, last = (step + 1) // each, step + 1 == self.steps
        if self.settings.save_every and epoch % self.settings.save_every == 0 and not last:
            self.watch.save(self.learned())
        if self.settings.preview_every and (epoch % self.settings.preview_every == 0 or last):
            self.history.previews.append(Preview(epoch, self.draw()))
            self.watch.show(step, self.history.previews[-1].latents[0])

    def learned(self, final: bool = False) -> Learned:
        """What has been learned by now."""
        epoch = self.step // max(1, self.order.steps_per_epoch)
        return Learned(self.factors, self.step, epoch, self.snapshot, final)

    def snapshot(self) -> dict[str, Tensor]:
        """What resuming takes: everything else follows from the settings and the pictures."""
        found = {f"factor.{name}": tensor.detach().cpu().clone() for name, tensor in self.named().items()}
        found |= {f"optimiser.{name}": value for name, value in state_of(self.optimiser.steps).items()}
        return found | {"step": torch.tensor(self.step)}

    @torch.no_grad()
    def draw(self) -> list[Tensor]:
        """The previewed prompts, from the same noise each time, by DPM-Solver++ (2M)."""
        from comfy.k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m

        guidance = self.settings.guidance
        shape = max((e.latent for e in self.examples if not e.prior), key=lambda latent: latent.numel()).shape
        levels = get_sigmas_karras(PREVIEW_STEPS, float(self.sigmas[0]), float(self.sigmas[-1]), device=self.device)
        found = []
        for number, text in enumerate(self.previewed):
            drawn = training.generator_at(self.settings.seed, "preview", number)
            start = torch.randn(shape, generator=drawn).to(self.device) * (1 + levels[0] ** 2) ** 0.5  # as the host

            def guided(x: Tensor, sigma: Tensor, text: str = text, **_: Any) -> Tensor:
                with_text, without = self.predict(x.repeat(2, 1, 1, 1), sigma.repeat(2), [text, ""]).chunk(2)
                return without + guidance * (with_text - without)

            found.append(sample_dpmpp_2m(guided, start, levels, disable=True).cpu())
        return found
