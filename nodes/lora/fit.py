"""How a LoRA learns: a sampler function for the host that trains in place of sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.lora import level_weight, min_snr_weight, with_offset
from .. import training
from ..training.fitting import Fitting
from ..training.pictures import Order
from ..training.prompts import Prompts
from .files import Parts
from .pictures import Example
from .settings import LoRASettings

PREVIEW_STEPS = 20


class FitLoRA(Fitting):
    """Trains factors on examples, which are in the model's own scale, on the CPU.

    previewed: prompts to draw, at the size of the largest picture.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        prompts: Prompts,
        factors: Parts,
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
        rates = {"unet": settings.learning_rate, "biases": settings.learning_rate, "text": settings.text_rate}
        super().__init__(Order(examples, settings), factors, settings, rates=rates, watch=watch, state=state)
        self.examples, self.prompts, self.previewed = examples, prompts, previewed
        self.loss, self.velocity, self.sigmas, self.reader = loss, velocity, sigmas, reader

    @property
    def steps(self) -> int:
        """Of the optimiser, in all epochs."""
        return self.settings.epochs * self.unit

    @property
    def unit(self) -> int:
        """An epoch's: files and previews are counted in epochs."""
        return self.order.steps_per_epoch

    def weight(self, rows: list[int], batches: list[list[int]]) -> float:
        """Pictures of the class count apart."""
        if self.examples[rows[0]].prior:
            return self.settings.prior_weight
        return 1.0 / sum(not self.examples[row].prior for rows in batches for row in rows)

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
        weight = min_snr_weight(sigma, settings.min_snr_gamma, self.velocity)
        weight = (weight * level_weight(sigma, settings.loss_weight, self.velocity)).to(self.device)
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
        self.read(texts)
        return self.model(x, sigma, **self.arguments)

    def read(self, texts: list[str]) -> None:
        """Let the model's next calls see these texts, a row each."""
        self.reader.context, self.reader.pooled = self.prompts.batch(texts, self.device)

    @torch.no_grad()
    def draw(self) -> list[Tensor]:
        """The previewed prompts, from the same noise each time, by DPM-Solver++ (2M)."""
        from comfy.k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m

        guidance = self.settings.guidance
        shape = max((e.latent for e in self.examples if not e.prior), key=lambda latent: latent.numel()).shape
        levels = get_sigmas_karras(PREVIEW_STEPS, float(self.sigmas[0]), float(self.sigmas[-1]), device=self.device)
        found = []
        for number, text in enumerate(self.previewed):
            self.read([text, ""])  # once: nothing learns between the steps
            drawn = training.generator_at(self.settings.seed, "preview", number)
            start = torch.randn(shape, generator=drawn).to(self.device) * (1 + levels[0] ** 2) ** 0.5  # as the host

            def guided(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
                both = self.model(x.repeat(2, 1, 1, 1), sigma.repeat(2), **self.arguments)
                with_text, without = both.chunk(2)
                return without + guidance * (with_text - without)

            found.append(sample_dpmpp_2m(guided, start, levels, disable=True).cpu())
        return found
