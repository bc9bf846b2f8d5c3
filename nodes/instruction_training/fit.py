"""How an instruction model learns: a sampler function for the host that trains in place of sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.instruction_training import dropout_bands, towards_the_edited, two_guidances
from ...kernels.lora import min_snr_weight
from .. import training
from ..training.fitting import Fitting
from ..training.optimisers import Learning
from ..training.pictures import Order
from .adversary import Adversary
from .blending import RATE, BlendedPass, with_step
from .examples import Example
from .reads import Reads
from .settings import InstructionSettings
from .words import WordsInside

PREVIEW_STEPS = 20


class FitInstruction(Fitting):
    """Trains on examples. shown: those that previews draw, after `preview_every` steps and at the end.

    reads: what makes the prompts of examples, a text encoder or an edit head. inside: where the words of the running
    call act, for a training with masks. blended: how the source's features flow back, where their shares learn beside.
    as_latent: the VAE's latent in the model's scale.
    """

    fault = ("for these triples", "the pictures and the instructions")

    def __init__(
        self,
        examples: Sequence[Example],
        reads: Reads,
        factors: dict[str, Learning],
        settings: InstructionSettings,
        *,
        loss: Callable[..., Tensor],
        velocity: bool,
        sigmas: Tensor,
        reader: training.ReadTokens,
        inside: WordsInside | None,
        blended: BlendedPass | None,
        as_latent: Callable[[Tensor], Tensor],
        shown: Sequence[Example],
        watch: training.Watch,
        state: dict[str, Tensor] | None = None,
    ):
        rates = dict.fromkeys(factors, settings.learning_rate) | {"blend": RATE}
        super().__init__(Order(examples, settings), factors, settings, rates=rates, watch=watch, state=state)
        self.examples, self.reads, self.inside, self.shown = examples, reads, inside, shown
        self.blended, self.as_latent = blended, as_latent
        self.loss, self.velocity, self.sigmas, self.reader = loss, velocity, sigmas, reader
        self.opponent: Adversary | None = None

    def prepare(self) -> None:
        super().prepare()
        if self.settings.adversarial:
            self.opponent = Adversary(self.examples, self.settings.seed, self.device)
            self.opponent.restore(self.state)

    def snapshot(self) -> dict[str, Tensor]:
        return super().snapshot() | ({} if self.opponent is None else self.opponent.snapshot())

    def losses(self, step: int, batch: int, rows: list[int]) -> tuple[Tensor, list[float]]:
        """(loss of each triple, its place in the schedule) of one batch."""
        settings, drawn = self.settings, training.generator_at(self.settings.seed, "step", step, batch)
        examples = [self.examples[row] for row in rows]
        bands = settings.drop_text, settings.drop_both, settings.drop_picture
        told, seen = dropout_bands(torch.rand(len(rows), generator=drawn), *bands)
        levels = (torch.rand(len(rows), generator=drawn) * len(self.sigmas)).long()
        edited = torch.cat([example.latent for example in examples])
        sigma = self.sigmas[levels]
        noise = sigma[:, None, None, None] * torch.randn(edited.shape, generator=drawn)
        noise, edited, sigma = (tensor.to(self.device) for tensor in (noise, edited, sigma))
        kinds = {"told": told.tolist(), "seen": seen.tolist()}
        denoised = self.predict(edited + noise, sigma, examples, noise=noise, **kinds)
        weight = min_snr_weight(sigma, settings.min_snr_gamma, self.velocity)
        noise_error = weight * self.loss(denoised, edited, sigma)
        found = towards_the_edited(noise_error, denoised, edited, settings.reconstruction)
        if self.opponent is not None:
            found = found + settings.adversarial * self.opponent.loss(denoised, edited)
        return found, ((levels + 1) / len(self.sigmas)).tolist()

    def predict(
        self,
        x: Tensor,
        sigma: Tensor,
        examples: Sequence[Example],
        *,
        told: list[bool],
        seen: list[bool],
        noise: Tensor,
    ) -> Tensor:
        """The model's x_0 of noised results (B, C, h, w) at sigma (B,): told their instruction or not, seen or not.

        noise: as it lies on the sources, whose features are blended in.
        """
        if self.blended is None:
            return self.call(x, sigma, examples, told=told, seen=seen)
        sources = torch.cat([self.as_latent(example.source) for example in examples]).to(self.device) + noise
        count = len(examples)

        def run(arguments: dict) -> Tensor:
            alone = {"told": [False] * count, "seen": [True] * count}
            return self.call(sources, sigma, examples, **alone, arguments=arguments)

        step = self.blended.record(run, self.arguments)
        return self.call(x, sigma, examples, told=told, seen=seen, arguments=with_step(self.arguments, step))

    def call(
        self,
        x: Tensor,
        sigma: Tensor,
        examples: Sequence[Example],
        *,
        told: list[bool],
        seen: list[bool],
        arguments: dict | None = None,
    ) -> Tensor:
        """The model's x_0, by the host's own path."""
        pictures = torch.cat([example.source * see for example, see in zip(examples, seen, strict=True)])
        self.reader.context, self.reader.pooled = self.reads.batch(examples, told, self.device)
        self.reader.more = {"concat_latent_image": pictures.to(self.device)}
        if self.inside is not None:
            self.inside.look([example.mask if tell else None for example, tell in zip(examples, told, strict=True)])
        return self.model(x, sigma, **(arguments or self.arguments))

    @torch.no_grad()
    def draw(self) -> list[Tensor]:
        """The shown examples by both guidances, from the same noise each time, by DPM-Solver++ (2M)."""
        from comfy.k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m

        levels = get_sigmas_karras(PREVIEW_STEPS, float(self.sigmas[0]), float(self.sigmas[-1]), device=self.device)
        scales, found = (self.settings.text_guidance, self.settings.picture_guidance), []
        for number, example in enumerate(self.shown):
            drawn = training.generator_at(self.settings.seed, "preview", number)
            noise = torch.randn(example.latent.shape, generator=drawn).to(self.device)

            def guided(x: Tensor, sigma: Tensor, example: Example = example, noise: Tensor = noise, **_: Any) -> Tensor:
                rows, kinds = [example] * 3, {"told": [True, False, False], "seen": [True, True, False]}
                laid = sigma * noise.repeat(3, 1, 1, 1)
                three = self.predict(x.repeat(3, 1, 1, 1), sigma.repeat(3), rows, noise=laid, **kinds)
                return two_guidances(*three.chunk(3), *scales)

            start = noise * (1 + levels[0] ** 2) ** 0.5  # as the host
            found.append(sample_dpmpp_2m(guided, start, levels, disable=True).cpu())
        return found
