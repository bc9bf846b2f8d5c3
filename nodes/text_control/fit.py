"""How a text control learns: a sampler function for the host that trains in place of sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import exact_text, training
from ..training.fitting import Fitting
from ..training.pictures import Order
from ..training.prompts import Prompts
from .examples import Example
from .reading import ReadDrawn
from .settings import TrainSettings
from .trained import ControlWeights, LearningControl, Projection

PREVIEW_STEPS, PREVIEWED = 20, 2


class FitTextControl(Fitting):
    """Trains a control and a projection on examples, the U-Net and the text encoder being frozen.

    prompts: of a CLIP that is loaded by then. reading: the loss of what is read in the drawn pictures, where it counts.
    """

    fault: ClassVar[tuple[str, str]] = ("for these pictures", "the pictures and their texts")

    def __init__(
        self,
        examples: Sequence[Example],
        learning: tuple[ControlWeights, Projection],
        settings: TrainSettings,
        *,
        control: LearningControl,
        prompts: Prompts,
        reader: training.ReadTokens,
        loss: Callable[..., Tensor],
        sigmas: Tensor,
        reading: ReadDrawn | None,
        watch: training.Watch,
        state: dict[str, Tensor] | None = None,
    ):
        factors = dict(zip(("control", "embeddings"), learning, strict=True))
        rates = dict.fromkeys(factors, settings.learning_rate)
        super().__init__(Order(examples, settings), factors, settings, rates=rates, watch=watch, state=state)
        self.examples, self.projection, self.control, self.prompts = examples, learning[1], control, prompts
        self.reader, self.loss, self.sigmas, self.reading = reader, loss, sigmas, reading

    def losses(self, step: int, batch: int, rows: list[int]) -> tuple[Tensor, list[float]]:
        """What each picture of a batch costs, and its place in the schedule."""
        settings, drawn = self.settings, training.generator_at(self.settings.seed, "step", step, batch)
        examples = [self.examples[row] for row in rows]
        levels = (torch.rand(len(rows), generator=drawn) * len(self.sigmas)).long()
        shown = torch.rand(len(rows), generator=drawn) < settings.blank_share
        clean = torch.cat([example.latent for example in examples])
        sigma = self.sigmas[levels]
        noised = clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=drawn)
        hints = torch.cat([e.hint(blank=not s) for e, s in zip(examples, shown.tolist(), strict=True)])
        denoised = self.predict(noised.to(self.device), sigma.to(self.device), examples, hints)
        found = self.loss(denoised, clean.to(self.device), sigma.to(self.device), self.where(examples))
        if self.reading is not None:
            found = found + settings.reading_weight * self.reading(denoised, sigma, examples)
        return found, ((levels + 1) / len(self.sigmas)).tolist()

    def where(self, examples: list[Example]) -> Tensor | None:
        """The weight of each place, where any picture has text that is not learned."""
        if all(example.where is None for example in examples):
            return None
        whole = torch.ones(1, 1, *examples[0].bucket)
        return torch.cat([whole if e.where is None else e.where for e in examples]).to(self.device)

    def predict(self, x: Tensor, sigma: Tensor, examples: list[Example | None], hints: Tensor) -> Tensor:
        """The model's x_0 of noised pictures (B, C, H, W) at sigma (B,), by their texts and hints; None: no text."""
        self.read(examples, hints)
        return self.model(x, sigma, **self.arguments)

    def read(self, examples: list[Example | None], hints: Tensor) -> None:
        """Let the model's next calls see the texts and hints of these examples, a row each."""
        self.control.hint = hints
        found = [self.encode(example) for example in examples]
        whole = math.lcm(*(each.shape[1] for each in found))  # shorter ones are repeated, as the host does
        self.reader.context = torch.cat([each.repeat(1, whole // each.shape[1], 1) for each in found])

    def encode(self, example: Example | None) -> Tensor:
        """The prompt of an example as the model reads it (1, L, D), with a gradient into the projection."""
        if example is None:
            tokens = self.prompts.clip.tokenize("")
        else:
            embeddings = self.projection(example.necks[example.order])
            tokens = exact_text.tokens_with(self.prompts.clip, example.prompt, embeddings)
        return self.prompts.encode_tokens(tokens)[0].to(self.device)

    @torch.no_grad()
    def draw(self) -> list[Tensor]:
        """The first pictures' texts drawn anew, from the same noise each time, by DDIM as AnyText does."""
        from comfy.k_diffusion.sampling import sample_euler
        from comfy.samplers import ddim_scheduler

        levels = ddim_scheduler(self.control.sampling, PREVIEW_STEPS).to(self.device)
        found = []
        for number, example in enumerate(self.examples[:PREVIEWED]):
            drawn = training.generator_at(self.settings.seed, "preview", number)
            start = torch.randn(example.latent.shape, generator=drawn).to(self.device) * (1 + levels[0] ** 2) ** 0.5
            self.read([example, None], example.hint(blank=True).repeat(2, 1, 1, 1))  # once: nothing learns meanwhile

            def guided(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
                both = self.model(x.repeat(2, 1, 1, 1), sigma.repeat(2), **self.arguments)
                with_text, without = both.chunk(2)
                return without + self.settings.guidance * (with_text - without)

            found.append(sample_euler(guided, start, levels, disable=True).cpu())
        return found
