"""FlowEdit: a picture edited by the difference of two velocities, as a sampler of the host. No inversion."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import flow_inversion as maths
from .. import host
from ..settings import Settings
from .flow import velocity_in

NAME = "FlowEdit Sampler"
USE_INVERSION = "use Invert Picture and the inverted noise"


@dataclass(frozen=True)
class FlowEditSettings(Settings):
    """How a picture is edited without inversion; see PalimpsestFlowEdit for what each does."""

    source_guidance: float = 3.5
    start_percent: float = 0.34
    end_percent: float = 1.0
    averages: int = 1


@dataclass(frozen=True, eq=False)
class Source:
    """The prompts of the picture as it is, and their guidance."""

    positive: list
    negative: list | None
    guidance: float

    def refuse_unsound(self, model: Any, levels: list[float]) -> None:
        """Raise ValueError for prompts that a host MODEL cannot read, or that are silent at some of the levels."""
        negative = None if self.guidance == 1.0 else self.negative
        for name, prompt in (("source", self.positive), ("source_negative", negative)):
            if prompt is not None:
                host.require_readable(model, prompt, name)
                host.require_active(model, prompt, levels, name)

    def begin(self, guider: Any, noise: Tensor, **others: Any) -> Callable[[Tensor, Tensor, dict, Any], Tensor]:
        """denoised(x, levels, model_options, seed) of these prompts; others as the host's process_conds takes them."""
        import comfy.sampler_helpers
        import comfy.samplers

        given = {"positive": self.positive} | ({} if self.negative is None else {"negative": self.negative})
        conds = {name: comfy.sampler_helpers.convert_cond(host.source_prompt(each)) for name, each in given.items()}
        comfy.samplers.process_conds(guider.inner_model, noise, conds, noise.device, **others)

        def denoised(x: Tensor, level: Tensor, model_options: dict, seed: Any) -> Tensor:
            return comfy.samplers.sampling_function(
                guider.inner_model,
                x,
                level,
                conds.get("negative"),
                conds["positive"],
                cond_scale=self.guidance,
                model_options=of_the_source(model_options),
                seed=seed,
            )

        return denoised


def of_the_source(model_options: dict) -> dict:
    """Options of a model call that looks at the picture as it is."""
    options = model_options.get("transformer_options", {})
    return model_options | {"transformer_options": options | {host.OF_A_NODE: True}}


class Course:
    """One run: the picture (B, C, ...), the two velocities, and the noise that both are asked under.

    mask (B, 1, ...) on the latent's grid, 0 where the picture stays; None for all of it.
    """

    def __init__(self, clean: Tensor, mask: Tensor | None, target: Callable, source: Callable, seed: int | None):
        self.clean, self.mask, self.edited = clean, mask, clean
        self.target, self.source = velocity_in(target), velocity_in(source)
        self.generator = torch.Generator().manual_seed(seed or 0)
        self.noise: Tensor | None = None
        self.whole: Tensor | None = None

    def draw(self) -> Tensor:
        """Fresh noise, the same on every device."""
        noise = torch.randn(self.clean.shape, generator=self.generator, dtype=torch.float32)
        self.noise = noise.to(self.clean)
        return self.noise

    def move(self, t: float, t_next: float, averages: int) -> None:
        """FlowEdit's step, the velocities' means over some draws."""
        found = []
        for _ in range(averages):
            host.stop_if_cancelled()
            source = maths.noised(self.clean, self.draw(), t)
            asked = maths.coupled(self.edited, self.clean, source)
            found.append((self.target(asked, t), self.source(source, t)))
        target, source = (sum(each) / averages for each in zip(*found, strict=True))
        self.edited = self.inside(maths.flow_edit_step(self.edited, target, source, t, t_next), self.edited)

    def finish(self, t: float, t_next: float) -> None:
        """A plain step of the edit as a latent with noise, from the first such step's own draw on."""
        if self.whole is None:
            self.whole = maths.coupled(self.edited, self.clean, maths.noised(self.clean, self.draw(), t))
        stepped = maths.euler(self.whole, self.target(self.whole, t), t, t_next)
        self.whole = self.inside(stepped, maths.noised(self.clean, self.noise, t_next))
        self.edited = self.whole

    def inside(self, new: Tensor, old: Tensor) -> Tensor:
        """The new in the mask, the old outside of it, each to the bit."""
        return new if self.mask is None else torch.lerp(old, new, self.mask)


@dataclass(frozen=True, eq=False)
class FlowEditing:
    """A host sampler function: FlowEdit (arXiv:2412.08629) from the sampled latent, towards the guider's prompts.

    Above the window's levels nothing is done (the paper's n_max), below it the edit is sampled plainly (its n_min).
    mask (1 or B, h, w): black where the picture stays. remarks: of a mask that does not fit the latent.
    """

    source: Source
    settings: FlowEditSettings
    mask: Tensor | None = None
    remarks: host.Remarks = host.UNHEARD

    adds_noise = False  # as host.agreement asks: what it draws leaves again with the difference

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict | None = None,
        callback: Callable | None = None,
        disable: bool | None = None,
        **_: Any,
    ) -> Tensor:
        """x (B, C, ...), of which only the kind counts -> the edited picture. Raises ValueError for what cannot be."""
        from comfy.k_diffusion.sampling import trange

        levels, guider = sigmas.tolist(), model.inner_model
        window = host.Window.of(guider.model_patcher, self.settings.start_percent, self.settings.end_percent)
        course = self.course(model, levels, extra_args or {})
        for i in trange(len(levels) - 1, disable=disable):
            t, t_next = levels[i], levels[i + 1]
            if t > window.sigma_start and not window.always:
                continue
            if t in window or window.always:
                course.move(t, t_next, self.settings.averages)
            else:
                course.finish(t, t_next)
            if callback is not None:
                seen = {"x": course.edited, "denoised": course.edited}
                callback({"i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], **seen})
        if not host.is_finite(course.edited):
            raise ValueError(
                f"{NAME} got NaN or infinite values from the model: run it in another precision (start ComfyUI with "
                "--bf16-unet or --fp32-unet), or look at the prompts and the picture."
            )
        return course.edited

    def course(self, model: Any, levels: list[float], extra_args: dict) -> Course:
        """What the run needs. Raises ValueError for other models, no picture, levels that end above 0."""
        guider, clean = model.inner_model, model.latent_image
        host.require_flow(guider.inner_model.model_sampling, NAME, USE_INVERSION)
        if clean is None or torch.count_nonzero(clean) == 0:
            raise ValueError(f"{NAME} edits a picture, latent_image is empty: connect VAE Encode of your picture.")
        require_way_to_clean(levels)
        self.source.refuse_unsound(guider.model_patcher, levels)
        unlike = None if self.mask is None else host.stretched(self.mask, tuple(clean.shape[-2:]))
        self.remarks.say([unlike] if unlike else [])
        denoise_mask, seed = extra_args.get("denoise_mask"), extra_args.get("seed")
        asked = {"model_options": extra_args.get("model_options", {}), "seed": seed}
        source = self.source.begin(guider, clean, latent_image=clean, denoise_mask=denoise_mask, seed=seed)
        return Course(
            clean,
            weights(self.mask, denoise_mask, clean),
            target=at_one_level(partial(guider, **asked)),
            source=at_one_level(partial(source, **asked)),
            seed=seed,
        )


def at_one_level(denoised: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """A prediction for all rows at a level that is a number."""
    return lambda x, t: denoised(x, x.new_full((len(x),), t))


def require_way_to_clean(levels: list[float]) -> None:
    """Raise ValueError for noise levels that do not fall to 0, or are not a flow's."""
    host.require_flow_levels(levels)
    if levels[-1] != 0 or any(high <= low for high, low in itertools.pairwise(levels)):
        raise ValueError(
            f"{NAME} needs noise levels that fall to 0, they read {levels[0]:.4g} ... {levels[-1]:.4g}: connect a "
            "scheduler's SIGMAS as they are, or their low part."
        )


def weights(mask: Tensor | None, denoise_mask: Tensor | None, clean: Tensor) -> Tensor | None:
    """Mask and inpainting mask on the latent's grid, multiplied; None without both. A clip has one, or one a frame.

    A mask of the picture is cut as the VAE cut the picture.
    """
    found = None
    if mask is not None:
        found = host.rows_on(host.as_encoded(mask, tuple(clean.shape[-2:])), clean).to(clean)
    if denoise_mask is None:
        return found
    return denoise_mask.to(clean) if found is None else found * denoise_mask.to(clean)
