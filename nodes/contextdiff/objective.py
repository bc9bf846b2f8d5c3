"""ContextDiff's training objective (arXiv:2402.16627, eq. 6): pictures with their prompts, through the host's U-Net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.contextdiff import (
    bias_level,
    context_loss,
    contextual_noised,
    flow_bias_level,
    flow_noise_angle,
    flow_noised,
    flow_weight,
    noise_angle,
    shifted_noise,
    snr_weight,
)
from .. import host
from .bias import PAPER, RELEASED_CODE, noisiest
from .sight import Sight

CLEAN, PREDICTED = "x0", "x0_hat"


# ------------------------------------------------------------------------------------------------------ one draw


@dataclass(frozen=True)
class Kind:
    """What differs between diffusion and flow-matching models: noised pictures, B, the level told to r_phi, lambda."""

    noised: Callable[[Tensor, Any, Tensor, Tensor], Tensor]
    level: Callable[[float], float]
    angle: Callable[[float], float]
    weight: Callable[[float, float], float]


DIFFUSION = Kind(contextual_noised, bias_level, noise_angle, snr_weight)
FLOW = Kind(flow_noised, flow_bias_level, flow_noise_angle, flow_weight)


@dataclass(frozen=True)
class Draw:
    """Pictures, their prompts, a noise level each and the noise: what one evaluation of the loss is made from.

    clean, noise (B, C, H, W) in the model's own latent scale; text (B, L, D); sigmas B numbers.
    """

    rows: list[int]
    clean: Tensor
    text: Tensor
    sigmas: tuple[float, ...]
    noise: Tensor
    kind: Kind = DIFFUSION

    def column(self, function: Callable[[float], float] = float) -> Tensor:
        """A function of each picture's noise level, (B, 1, 1, 1)."""
        return self.clean.new_tensor([function(s) for s in self.sigmas])[:, None, None, None]

    def plain(self) -> Tensor:
        """The noised pictures without a bias."""
        return self.kind.noised(self.clean, 0.0, self.noise, self.column())


def biased(draw: Draw, r: Tensor, top: float) -> Tensor:
    """The paper's noised pictures, x_0 + B(sigma) r + sigma eps; no bias at the noisiest level (k_T := 0).     eq. 1"""
    bias = draw.column(lambda sigma: draw.kind.level(sigma) if sigma < top else 0.0) * r
    return draw.kind.noised(draw.clean, bias, draw.noise, draw.column())


def with_shifted_noise(draw: Draw, r: Tensor, top: float) -> Tensor:
    """The released code's noised pictures, x_0 + sigma (eps + 0.018125 r)."""
    return draw.kind.noised(draw.clean, 0.0, shifted_noise(draw.noise, r), draw.column())


def true_picture(draw: Draw, predict: Callable[[Draw, Tensor], Tensor]) -> Tensor:
    """r is evaluated at x_0, as the paper trains."""
    return draw.clean


def predicted_picture(draw: Draw, predict: Callable[[Draw, Tensor], Tensor]) -> Tensor:
    """r is evaluated at what the network makes of the unbiased noised picture, as sampling evaluates it."""
    with torch.no_grad():
        return predict(draw, draw.plain()).detach()


FORWARD: dict[str, Callable[[Draw, Tensor, float], Tensor]] = {PAPER: biased, RELEASED_CODE: with_shifted_noise}
SEEN: dict[str, Callable] = {PREDICTED: predicted_picture, CLEAN: true_picture}


# ------------------------------------------------------------------------------------------ prompts and pictures


@dataclass
class PickRows:
    """CALC_COND_BATCH wrapper: the model is called for some of the pictures, whose prompts it must get.

    The prompts have a row for each of `pictures`; `rows` are those of the coming call.
    """

    pictures: int
    rows: list[int] = field(default_factory=list)

    def __call__(self, executor: Any, model: Any, conds: list, *args: Any) -> list[Tensor]:
        picked = [None if cond is None else [self.picked(entry) for entry in cond] for cond in conds]
        return executor(model, picked, *args)

    def picked(self, cond: dict) -> dict:
        """One cond with the rows of the pictures of this call."""

        def pick(value: Any) -> Any:
            tensor = getattr(value, "cond", None)
            several = isinstance(tensor, Tensor) and len(tensor) == self.pictures > 1
            return type(value)(tensor[self.rows]) if several else value

        return cond | {"model_conds": {name: pick(value) for name, value in cond["model_conds"].items()}}


# ------------------------------------------------------------------------------------------------------ the loss


@dataclass(frozen=True)
class Objective:
    """Eq. 6 of a network r_phi, within one run of the host's sampling.

    latents (N, C, H, W) in the model's own scale, on the CPU; text (1 or N, L, D), or the maps of a class or layout, on
    the device. model and arguments are what the host calls a sampler function with. sight: what a network that sees
    through CLIP sees with.
    """

    network: nn.Module
    latents: Tensor
    text: Tensor
    model: Any
    arguments: dict
    pick: PickRows
    formula: str
    min_snr_gamma: float
    sight: Sight | None = None

    @property
    def sampling(self) -> Any:
        """The host's noise schedule."""
        return self.model.inner_model.inner_model.model_sampling

    @property
    def kind(self) -> Kind:
        """Of the model that is asked."""
        return FLOW if host.is_flow_sampling(self.sampling) else DIFFUSION

    @property
    def top(self) -> float:
        """The level from which on there is no bias."""
        return noisiest(self.sampling)

    def sigma(self, share: float) -> float:
        """The noise level at a share (0 noise to 1 clean) of the schedule, within what the network was trained on."""
        lowest, highest = float(self.sampling.sigma_min), float(self.sampling.sigma_max)
        return min(max(float(self.sampling.percent_to_sigma(share)), lowest), highest)

    def draw(self, rows: list[int], shares: list[float], generator: torch.Generator) -> Draw:
        """A Draw for some pictures at these shares of the schedule."""
        clean = self.latents[rows].to(self.text)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        text = self.text[rows] if len(self.text) > 1 else self.text.expand(len(rows), *self.text.shape[1:])
        return Draw(rows, clean, text, tuple(map(self.sigma, shares)), noise, self.kind)

    def predict(self, draw: Draw, x: Tensor) -> Tensor:
        """f_theta(x, c, t) of noised pictures, without guidance."""
        self.pick.rows = draw.rows
        return self.model(x, draw.column()[:, 0, 0, 0], **self.arguments)

    def losses(self, draw: Draw, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(loss of each picture, prediction) with r evaluated at `seen`.                                       eq. 6"""
        angle = draw.column(draw.kind.angle)[:, 0, 0, 0]
        frames = len(draw.rows) if self.network.config.video else 1
        r = self.network(seen, draw.text, angle, frames, self.picture(draw, seen))
        return self.weighted(draw, FORWARD[self.formula](draw, r, self.top))

    def picture(self, draw: Draw, seen: Tensor) -> Tensor | None:
        """What the network sees of a draw's pictures through CLIP, if it does."""
        if self.sight is None:
            return None
        return self.sight.of_rows(draw.rows).seen(seen, self.model.inner_model.inner_model.process_latent_out)

    def weighted(self, draw: Draw, x: Tensor) -> tuple[Tensor, Tensor]:
        """(lambda_t |f(x) - x_0|^2 of each picture, prediction)."""
        denoised = self.predict(draw, x)
        weight = draw.column(lambda sigma: draw.kind.weight(sigma, self.min_snr_gamma))[:, 0, 0, 0]
        return context_loss(denoised, draw.clean, weight), denoised
