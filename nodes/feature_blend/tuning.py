"""Learning one alpha a feature for one picture: the founding paper's "blending weights", without training a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import feature_blend as maths
from .. import host, inputs, training
from ..host import gradient
from ..settings import Settings
from . import apply as feature_apply
from . import layers as layering
from .blend import Alpha, BlendFeatures, sources_of
from .layers import Feature, FeatureLayer
from .weights import BlendWeights

Report = Callable[[int, float], None]

# The discriminator's own rate: the usual one of patch discriminators (pix2pix, arXiv:1611.07004).
DISCRIMINATOR_RATE = 2e-4


@dataclass(frozen=True)
class TuneSettings(Settings):
    """How alpha is fitted; see PalimpsestTuneFeatureBlend for what each does to the picture."""

    layers: str = "output, out"
    steps: int = 100
    learning_rate: float = 0.1
    guidance: float = 7.5
    keep_edit: float = 1.0
    adversarial: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Prompts:
    """CONDITIONINGs: of the source, of the edit, and the negative one of the edit."""

    source: list
    edit: list
    negative: list | None = None


class LearnedAlphas(Mapping[Feature, Alpha]):
    """alpha = sigmoid(a) of every feature, a = 0 at first, which is the paper's 0.5; one for the whole picture.

    While `acting` is False there are none, and the model draws the edit as it is.
    """

    def __init__(self, layers: list[FeatureLayer], device: torch.device):
        self.raw = {layer.key: torch.zeros((), device=device, requires_grad=True) for layer in layers}
        self.acting = True

    def __getitem__(self, key: Feature) -> Alpha:
        return (torch.sigmoid(self.raw[key]),) * 2

    def __iter__(self) -> Iterator[Feature]:
        return iter(self.raw if self.acting else ())

    def __len__(self) -> int:
        return len(self.raw) if self.acting else 0

    def __contains__(self, key: object) -> bool:
        return self.acting and key in self.raw


class PatchDiscriminator(nn.Module):
    """Latents (B, C, H, W) -> scores (B, 1, h, w), each for a patch of 9 x 9 cells: is it the source's?"""

    def __init__(self, channels: int, operations: Any, generator: torch.Generator, width: int = 64):
        super().__init__()
        sizes = ((channels, width, 1), (width, 2 * width, 2), (2 * width, 1, 1))
        self.layers = nn.ModuleList(operations.Conv2d(a, b, 3, stride, 1) for a, b, stride in sizes)
        for layer in self.layers:  # as pix2pix begins
            nn.init.normal_(layer.weight, 0.0, 0.02, generator)
            nn.init.zeros_(layer.bias)

    def forward(self, latent: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(F.leaky_relu(second(F.leaky_relu(first(latent), 0.2)), 0.2))


class Opponent:
    """The adversarial term: a patch discriminator that learns beside alpha to tell predictions from the source."""

    def __init__(self, clean: Tensor, seed: int):
        import comfy.ops

        self.scale = clean.std().clamp_min(1e-6)
        self.real = torch.cat([clean, clean.flip(-1)]) / self.scale  # mirrored, too: one picture is little
        generator = torch.Generator().manual_seed(seed)
        self.network = PatchDiscriminator(clean.shape[1], comfy.ops.disable_weight_init, generator)
        self.network.to(clean.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), DISCRIMINATOR_RATE, betas=(0.5, 0.999))

    def loss(self, denoised: Tensor) -> Tensor:
        """The term in alpha's loss, after one step of the discriminator's own."""
        fake = denoised.float() / self.scale
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)
        self.optimiser.zero_grad(set_to_none=True)
        maths.discriminator_loss(self.network(self.real), self.network(fake.detach())).backward()
        self.optimiser.step()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        return maths.generator_loss(self.network(fake))


class FitAlphas:
    """A host sampler function: at levels of the trajectory in random order, one step of Adam on alpha each."""

    def __init__(self, blend: BlendFeatures, settings: TuneSettings, mask: Tensor | None, report: Report):
        self.blend, self.settings, self.mask, self.report = blend, settings, mask, report
        self.alphas: LearnedAlphas = blend.alphas
        self.losses: list[float] = []

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x (B, C, H, W) gives device and dtype and is returned unchanged: the result is in `alphas` and `losses`."""

        predict = partial(model, **(extra_args or {}))
        trajectory, weight = self.blend.trajectory, self.settings.adversarial
        inside, outside = self.regions(x)
        opponent = Opponent(trajectory.latents[-1].to(x).clone(), self.settings.seed) if weight else None
        optimiser = torch.optim.Adam(list(self.alphas.raw.values()), self.settings.learning_rate)
        reader, edits = gradient.LateReader(), {}
        for step, index in enumerate(self.order()):
            host.stop_if_cancelled()
            sigma, sigma_next = trajectory.sigmas[index : index + 2]
            here, there = (trajectory.latents[i].to(x).clone() for i in (index, index + 1))
            level = x.new_full((len(x),), sigma)
            if index not in edits:
                edits[index] = self.plain_edit(predict, here, level)
            denoised = predict(here, level)
            source = maths.straight_line_denoised(here, there, sigma, sigma_next)
            rebuilt, changed = maths.tuning_losses(denoised, source, edits[index], outside, inside)
            loss = rebuilt + self.settings.keep_edit * changed
            if opponent is not None:
                loss = loss + weight * opponent.loss(denoised)
            optimiser.zero_grad(set_to_none=True)
            # By the number of elements: half-precision gradients stay clear of underflow, and Adam is scale-free.
            (loss * x.numel()).backward()
            optimiser.step()
            self.note(step, reader.read(loss.detach()[None]))
            if callback is not None:
                callback({"i": step, "x": here, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised.detach()})
        self.note(self.settings.steps - 1, reader.rest())
        return x

    def regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(inside, outside) of the mask on the latent's grid; everything is both without one."""
        if self.mask is None:
            everywhere = x.new_ones(1, 1, *x.shape[-2:])
            return everywhere, everywhere
        inside = host.picture_rows(self.mask, len(x), *x.shape[-2:]).to(x)
        return inside, 1 - inside

    def order(self) -> Iterator[int]:
        """Indices of levels: all of the window before any comes again, shuffled by the seed."""
        where = {level: i for i, level in enumerate(self.blend.trajectory.sigmas)}
        indices = [where[level] for level in host.source_levels(self.blend)]
        generator, left = random.Random(self.settings.seed), []
        for _ in range(self.settings.steps):
            if not left:
                left = generator.sample(indices, len(indices))
            yield left.pop()

    def plain_edit(self, predict: Callable, x: Tensor, level: Tensor) -> Tensor:
        """What the model draws of the edit with nothing blended."""
        self.alphas.acting = False
        try:
            with torch.no_grad():
                return predict(x, level)
        finally:
            self.alphas.acting = True

    def note(self, step: int, arrived: Tensor | None) -> None:
        """Keep and tell a loss that has arrived. Raises ValueError for NaN."""
        if arrived is None:
            return
        if not bool(torch.isfinite(arrived).all()):
            raise training.nan_error(f"at step {step + 1} of the tuning", "the prompts and the picture")
        self.losses.append(float(arrived))
        self.report(step, self.losses[-1])


def tune(
    model: Any,
    trajectory: host.Trajectory,
    prompts: Prompts,
    settings: TuneSettings,
    *,
    report: Report,
    mask: Tensor | None = None,
    recording: Any = None,
    callback: Any = None,
) -> BlendWeights:
    """Fit one alpha a feature: rebuild the source outside of the mask, keep the edit inside (maths.tuning_losses).

    Latents are the trajectory's own at every level (the edit's path would have to be sampled again after every step).
    Gradients go into the alphas only; the model is left as it was. recording and callback hear of the two passes.
    Raises ValueError for other architectures, unusable masks, NaN, and models spread over several GPUs.
    """
    chosen = learnable(layering.parse(settings.layers, layering.feature_layers(model, feature_apply.TECHNIQUE)))
    feature_apply.check(model, trajectory, mask)
    if mask is not None and not 0 < float(mask.mean()) < 1:
        raise ValueError(
            "the mask of Tune Feature Blend is one colour all over: white is the edit, black is what is rebuilt; paint "
            "both, or leave it off."
        )
    named = {"target_positive": prompts.edit, "negative": prompts.negative}
    inputs.require_active(model, trajectory.sigmas, settings.guidance, **named)
    mask = None if mask is None else host.as_encoded(mask, trajectory.latents.shape[-2:])
    model = host.single_device(model)
    with torch.inference_mode(False), host.refused_by_name(model, "Tune Feature Blend"):
        alphas = LearnedAlphas(chosen, model.load_device)
        blend = BlendFeatures(trajectory, alphas, sources_of(chosen, False), host.Window.of(model, 0.0, 1.0))
        with torch.no_grad():
            source, how = feature_apply.features_of(model, blend, prompts.source, host.AUTO, recording)
        fitting = FitAlphas(blend, settings, mask, report)
        fit(model, fitting, source, prompts, gradient_start(chosen[0], model), callback)
    learned = {str(layer): float(torch.sigmoid(alphas.raw[layer.key].detach())) for layer in chosen}
    return BlendWeights(learned, trajectory.layout, {"losses": fitting.losses, "source": how, **settings.named()})


def fit(
    model: Any, fitting: FitAlphas, source: host.Source, prompts: Prompts, first: tuple[str, int], callback: Any
) -> None:
    """Run a fitting on a clone of the model that blends; first: the first block that a gradient touches."""
    trajectory = fitting.blend.trajectory
    patched, positive, negative = with_copied_skips(model, prompts)
    host.attach_source(patched, fitting.blend, source)
    patched, _ = gradient.prepare(patched, host.AttentionLayer(*first, 0, 0), False)
    host.sample(
        patched,
        fitting,
        model.model.process_latent_out(trajectory.latents[0].clone()),
        sigmas=torch.tensor(trajectory.sigmas),
        positive=positive,
        negative=negative,
        guidance=fitting.settings.guidance,
        callback=callback,
        unguided=True,
    )


def with_copied_skips(model: Any, prompts: Prompts) -> tuple[Any, list, list | None]:
    """(a clone, positive, negative) fit for a gradient where a ControlNet acts.

    The host adds it to the skips in place, after others have saved them for their gradient.
    """
    patched = model.clone()
    if not any("control" in extra for _, extra in (*prompts.edit, *(prompts.negative or ()))):
        return patched, prompts.edit, prompts.negative
    patched.set_model_input_block_patch_after_skip(lambda h, _: h.clone())
    return patched, *host.with_fixed_controls(prompts.edit, prompts.negative)


def learnable(layers: list[FeatureLayer]) -> list[FeatureLayer]:
    """Without "input 1", which edit and source share: no prompt has acted yet, and both are given the same latent.

    Raises ValueError where nothing is left.
    """
    found = [layer for layer in layers if layer.key != ("input", 1)]
    if not found:
        raise ValueError(
            "layers names 'input 1' only, which no prompt changes: there is nothing to learn; name others."
        )
    return found


def gradient_start(layer: FeatureLayer, model: Any) -> tuple[str, int]:
    """The block whose weights are the first that a gradient into this feature touches."""
    last = len(model.model.diffusion_model.output_blocks) - 1
    return ("output", last) if layer.key == layering.OUT else layer.key
